from __future__ import annotations

import pytest

from nanorun.server.errors import ApiError
from nanorun.server.model_names import ModelNames


@pytest.mark.parametrize(
    "asked",
    [None, "", "default", "pico", "PICO", "openai/pico", "pico:latest", "pico.gguf", "nano-pico"],
)
def test_name_is_known_but_for_case_owner_tag_and_ending(asked: str | None) -> None:
    ModelNames("pico", ("Nano-Pico",)).check(asked)


def test_other_name_is_refused_and_the_right_one_said() -> None:
    with pytest.raises(ApiError, match="'pico'") as caught:
        ModelNames("pico").check("gpt-5")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    ModelNames("pico", any_name=True).check("gpt-5")
