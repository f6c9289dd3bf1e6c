"""Whatever happened before, a reply equals a fresh evaluation of its tokens."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.runtime.harness import SMALL, Rig

# Repetitive ones let guesses from earlier text come true now and then.
TOKENS = st.one_of(
    st.lists(st.integers(32, 900), min_size=1, max_size=40),
    st.lists(st.integers(32, 36), min_size=1, max_size=40),
)


class Conversations(RuleBasedStateMachine):
    """Submit, continue, branch, edit, cancel, read ahead, evict, spill, restart, in any order."""

    model: ClassVar[Path]
    speculation: ClassVar[str] = "off"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        # Small enough that eviction, spilling to disk and a full cache happen all the time.
        options = replace(
            SMALL,
            n_ctx=256,
            archive_bytes=900_000,
            checkpoint_bytes=2_000_000,
            state_dir=self.folder.name,
            speculation=self.speculation,
        )
        self.rig = Rig(self.model, options)
        self.running: list[str] = []
        self.boundaries: dict[str, list[int]] = {}
        self.history: list[tuple[list[int], list[int]]] = [([], [])]

    def teardown(self) -> None:
        try:
            self.finish_all()
        finally:
            self.rig.close()
            self.folder.cleanup()

    @rule(
        data=st.data(),
        tail=TOKENS,
        n_tokens=st.integers(1, 20),
        boundaries=st.lists(st.integers(1, 200), max_size=3),
        read_only=st.booleans(),
        background=st.booleans(),
    )
    def submit(
        self,
        data: st.DataObject,
        tail: list[int],
        n_tokens: int,
        boundaries: list[int],
        read_only: bool,
        background: bool,
    ) -> None:
        """A new conversation, a next turn, or an edit: any earlier text, cut anywhere, and more."""
        earlier, cuts = data.draw(st.sampled_from(self.history))
        keep = data.draw(st.sampled_from([len(earlier), len(earlier) // 2, 0, *cuts]))
        prompt = (earlier[:keep] + tail)[:200]
        if read_only and not self.running:
            self.rig.submit(prompt, boundaries=boundaries, read_only=True)
            return
        request_id = self.rig.submit(
            prompt, n_tokens=n_tokens, boundaries=boundaries, background=background
        )
        self.running.append(request_id)
        self.boundaries[request_id] = boundaries

    @rule(n=st.integers(1, 8))
    def step(self, n: int) -> None:
        for _ in range(n):
            self.rig.step()
        self.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.rig.engine.cancel(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel_in_mid_batch(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(self.running), min_size=1))
        self.rig.strike(lambda: [self.rig.engine.cancel(name) for name in chosen])
        self.step(1)

    @rule()
    def evict(self) -> None:
        self.rig.engine.tree.make_room(self.rig.engine.context.n_ctx)

    @rule()
    def save(self) -> None:
        self.rig.engine.save_one()

    @precondition(lambda self: not self.running)
    @rule()
    def restart(self) -> None:
        self.finish_all()
        self.rig.reopen()

    @rule()
    def finish_all(self) -> None:
        self.rig.run()
        self.settle()
        assert not self.running

    def settle(self) -> None:
        """Check every reply that has ended since."""
        for request_id in [r for r in self.running if r in self.rig.finished]:
            self.running.remove(request_id)
            self.rig.check(request_id)
            said = self.rig.said(request_id)
            text = self.rig.prompts[request_id] + said
            self.history.append((text, self.boundaries[request_id]))


def check_conversations(
    model: Path, max_examples: int, n_steps: int, speculation: str = "off"
) -> None:
    fields = {"model": model, "speculation": speculation}
    machine = type("Conversations", (Conversations,), fields)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=n_steps,
            deadline=None,
            derandomize=max_examples < 100,  # the long ones look for what is new
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_replies_equal_fresh_evaluations_on_pico(pico_f32_gguf: Path) -> None:
    check_conversations(pico_f32_gguf, max_examples=40, n_steps=20)


def test_replies_equal_fresh_evaluations_on_a_dense_hybrid(dense_gguf: Path) -> None:
    check_conversations(dense_gguf, max_examples=40, n_steps=20)


def test_replies_equal_fresh_evaluations_with_guesses_from_earlier_text(
    pico_f32_gguf: Path,
) -> None:
    check_conversations(pico_f32_gguf, max_examples=40, n_steps=20, speculation="lookup")


@pytest.fixture
def bold_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head guesses even where it has no idea, so that much is taken back."""
    monkeypatch.setattr("nanorun.runtime.drafting.mtp._MIN_PROBABILITY", 0.0)


@pytest.mark.usefixtures("bold_head")
def test_replies_equal_fresh_evaluations_with_guesses_of_the_head(mtp_gguf: Path) -> None:
    check_conversations(mtp_gguf, max_examples=40, n_steps=20, speculation="mtp")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("bold_head")
@pytest.mark.parametrize(
    ("model", "speculation"),
    [("pico_f32_gguf", "off"), ("dense_gguf", "off"), ("pico_f32_gguf", "lookup"),
     ("mtp_gguf", "mtp")],
)  # fmt: skip
def test_replies_equal_fresh_evaluations_at_length(
    model: str, speculation: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    check_conversations(path, max_examples=500, n_steps=30, speculation=speculation)


def test_states_on_disk_are_what_a_restart_begins_with(pico_f32_gguf: Path, tmp_path: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, state_dir=str(tmp_path)))
    prompt = [32 + i % 700 for i in range(300)]
    rig.submit(prompt, read_only=True)
    rig.run()
    rig.reopen()
    tokens, finished = rig.ask([*prompt, 40, 41])
    assert (finished.usage.cached_tokens, finished.usage.cached_from) == (300, "disk")
    assert len(tokens) == 4
    rig.check("t1")
    rig.close()


def test_states_of_another_file_are_not_used(
    pico_f32_gguf: Path, pico_gguf: Path, tmp_path: Path
) -> None:
    options = replace(SMALL, state_dir=str(tmp_path))
    prompt = [32 + i % 700 for i in range(300)]
    rig = Rig(pico_f32_gguf, options)
    rig.submit(prompt, read_only=True)
    rig.run()
    rig.close()
    assert list(tmp_path.iterdir())
    other = Rig(pico_gguf, options)
    _, finished = other.ask([*prompt, 40, 41])
    assert finished.usage.cached_tokens == 0
    other.close()
