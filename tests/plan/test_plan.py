"""What a plan does not decide reaches the engine as it was asked for."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.plan.memory_plan import plan_model
from nanorun.plan.plan import DECIDED, Wish
from nanorun.plan.shape import shape_of_recipe
from nanorun.plan.smaller import smaller_plans
from tests.model.known_archs import NANO
from tests.plan.profiles import profile


def _another(value: Any) -> Any:
    """A value of the same type; a field of a new type has to be given one here."""
    match value:
        case bool():
            return not value
        case GgmlType():
            return GgmlType.Q8_0
        case int():
            return value + 1
        case "off":
            return "lookup"
        case None:
            return None
    raise AssertionError(f"what else could {value!r} be?")


CHANGED = EngineOptions(
    **{
        field.name: _another(getattr(EngineOptions(), field.name))
        for field in fields(EngineOptions)
    }
)
ASKED = replace(CHANGED, n_threads=3, state_dir="/states")


def test_no_field_of_the_options_is_forgotten_by_a_plan() -> None:
    shape = shape_of_recipe("nano", NANO, "q4_0")
    wish = Wish(n_ctx=131072, fixed=ASKED)
    plan = plan_model([shape], profile("rtx-4090"), wish)
    smaller = [less.plan.options for less in smaller_plans(plan)]
    assert smaller
    for options in (plan.options, *smaller):
        for field in fields(EngineOptions):
            if field.name not in DECIDED | {"n_parallel"}:
                assert getattr(options, field.name) == getattr(ASKED, field.name), field.name
    assert plan.options.n_parallel == ASKED.n_parallel


def test_plan_decides_only_fields_that_there_are() -> None:
    assert {field.name for field in fields(EngineOptions)} >= DECIDED


def test_plan_decides_whatever_was_fixed_of_its_own_fields() -> None:
    shape, machine = shape_of_recipe("nano", NANO, "q4_0"), profile("rtx-4090")
    reset = {name: getattr(EngineOptions(), name) for name in DECIDED}
    plans = [plan_model([shape], machine, Wish(n_ctx=8192, fixed=fixed))
             for fixed in (ASKED, replace(ASKED, **reset))]  # fmt: skip
    assert plans[0].options == plans[1].options


def test_engine_has_as_many_threads_as_the_machine_has_cores() -> None:
    shape, machine = shape_of_recipe("nano", NANO, "q4_0"), profile("rtx-4090")
    assert plan_model([shape], machine, Wish(n_ctx=8192)).options.n_threads == machine.host.n_cores


def test_options_survive_the_way_to_the_engine() -> None:
    sent = json.loads(json.dumps(asdict(ASKED)))
    assert EngineOptions(**sent) == ASKED
    assert type(EngineOptions(**sent).type_k) is GgmlType
