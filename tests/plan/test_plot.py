from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from nanorun.model.ggml_type import GgmlType
from nanorun.plan.memory_plan import Plan, Wish, plan_model
from nanorun.plan.memory_use import device_uses
from nanorun.plan.plot import plan_series, render_plot
from nanorun.plan.shape import shape_of_recipe
from tests.model.known_archs import NANO, TINY_MOE
from tests.plan.profiles import NAMES, profile

K = 1024
SVG = "{http://www.w3.org/2000/svg}"


def plan_on(machine: str, name: str = "nano") -> Plan:
    shape = shape_of_recipe(name, NANO, "q4_0")
    return plan_model([shape], profile(machine), Wish(n_ctx=32 * K))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("machine", ["rtx-4090", "cpu-24g"])
def test_series_end_where_the_memory_does(machine: str) -> None:
    plan = plan_on(machine)
    f16, q8_0, q4_0 = plan_series(plan)
    assert [s.type_kv for s in (f16, q8_0, q4_0)] == [GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0]
    assert f16.n_ctx[0] == 4 * K and f16.n_ctx[-1] == 1024 * K
    assert f16.longest and q8_0.longest and f16.longest < q8_0.longest < 1024 * K
    assert q4_0.longest == 1024 * K
    # One step further does not fit.
    settings = replace(plan.settings, n_ctx=f16.longest + 256, archive_bytes=0,
                       checkpoint_bytes=2 * 49_930_240)  # fmt: skip
    assert min(u.spare_bytes for u in device_uses(plan.shape, settings, plan.hardware)) < 0
    assert f16.needed_bytes[-1] > q8_0.needed_bytes[-1] > q4_0.needed_bytes[-1]
    assert f16.decode_tps[-1] < q8_0.decode_tps[-1] < q4_0.decode_tps[-1]
    assert list(f16.needed_bytes) == sorted(f16.needed_bytes)
    assert list(f16.decode_tps) == sorted(f16.decode_tps, reverse=True)


@pytest.mark.parametrize("machine", NAMES)
def test_picture_is_a_document_with_everything_in_its_frame(machine: str) -> None:
    svg = render_plot(plan_on(machine))
    root = ElementTree.fromstring(svg)
    _, _, width, height = (float(n) for n in root.attrib["viewBox"].split())
    lines = list(root.iter(f"{SVG}polyline"))
    assert 3 <= len(lines) <= 12
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height
    shown = texts(svg)
    assert {"4K", "64K", "1M"} <= set(shown)
    assert any(text.endswith(" free") for text in shown)


def test_labels_tell_how_far_each_type_goes() -> None:
    shown = texts(render_plot(plan_on("rtx-4090")))
    ends = [text for text in shown if ": to " in text]
    assert [text.split(":")[0] for text in ends] == ["f16", "q8_0", "q4_0"]
    assert ends[-1] == "q4_0: to 1M"


def test_labels_do_not_overlap() -> None:
    svg = render_plot(plan_on("rtx-3060-12g"))
    ends = [t for t in ElementTree.fromstring(svg).iter(f"{SVG}text")
            if (t.text or "").startswith(("f16:", "q8_0:", "q4_0:"))]  # fmt: skip
    memory, speed = ends[:3], ends[3:]
    for group in (memory, speed):
        ys = sorted(float(t.attrib["y"]) for t in group)
        assert all(b - a >= 14 for a, b in pairwise(ys))


def test_names_cannot_break_the_document() -> None:
    shown = texts(render_plot(plan_on("cpu-24g", 'a<b>&"c".gguf')))
    assert shown[0].startswith('a<b>&"c".gguf (q4_0) on ')


def test_model_of_short_context_has_a_picture_too() -> None:
    shape = shape_of_recipe("tiny", replace(TINY_MOE, n_ctx_train=1024), "q8_0")
    svg = render_plot(plan_model([shape], profile("cpu-24g"), Wish(n_ctx=512)))
    assert {"256", "512", "1K"} <= set(texts(svg))
