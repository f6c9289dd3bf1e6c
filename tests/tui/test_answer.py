from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from textual.app import App, ComposeResult
from textual.widgets import Static

from nanorun.tui.widgets.answer import Answer, CodeBlock

DOCUMENT = """# Title

Some *text* with `code`, **bold**, [red]no markup[/red], <div>no html</div> and [a link][ref].
A second line.

- a
- b
  - c

1. one

   more of one
2. two

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return f"[bold]{x}"

```

~~~
no language
~~~

> quote
> more

Setext
------

[ref]: https://example.com

last\u2028line\fend \x1b[31m
"""


class TwoAnswers(App[None]):
    """One answer that grows, and one that is given at once."""

    def compose(self) -> ComposeResult:
        yield Answer()
        yield Answer()


@pytest.fixture
async def answers() -> AsyncIterator[tuple[Answer, Answer]]:
    app = TwoAnswers()
    async with app.run_test(size=(80, 200)):
        grown, whole = app.query(Answer)
        yield grown, whole


def shown(answer: Answer) -> str:
    """All text below an answer, with the kinds of its blocks."""
    lines = [type(block).__name__ for block in answer.children]
    return "\n".join(lines + [str(static.render()) for static in answer.query(Static)])


@pytest.mark.parametrize("seed", range(6))
async def test_answer_in_fragments_looks_like_the_whole(
    answers: tuple[Answer, Answer], seed: int
) -> None:
    grown, whole = answers
    dice = random.Random(seed)
    rest = DOCUMENT
    while rest:
        n = dice.choice([1, 2, 3, 7, 40])
        await grown.append_fragment(rest[:n])
        rest = rest[n:]
    await grown.finish()
    await whole.append_fragment(DOCUMENT)
    await whole.finish()
    assert shown(grown) == shown(whole)
    assert "a link" in shown(whole)


async def test_answer_shows_markup_html_and_controls_as_text(
    answers: tuple[Answer, Answer],
) -> None:
    answer, _ = answers
    await answer.append_fragment("say [red]hi[/red] with <b>tags</b> & \x1b[31m\n[bold]")
    assert "say [red]hi[/red] with <b>tags</b> & \ufffd[31m\n[bold]" in shown(answer)


async def test_answer_keeps_line_ends(answers: tuple[Answer, Answer]) -> None:
    answer, _ = answers
    await answer.append_fragment("units: 12\ntens: 18")
    assert "units: 12\ntens: 18" in shown(answer)


@pytest.mark.parametrize("info", ["", "python", 'python title="x"', "no-such-language", "{r}"])
async def test_answer_shows_code_in_any_language(answers: tuple[Answer, Answer], info: str) -> None:
    answer, _ = answers
    await answer.append_fragment(f"```{info}\nx = [1]\n")
    assert answer.query_one(CodeBlock).code == "x = [1]"
    assert "x = [1]" in shown(answer)
