"""A plan as a picture: memory and decode speed against the context, for each type of KV cache.

Everything but the context and the type is as planned. SVG is written by hand: a few lines, areas
and labels are no reason for a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from nanorun.model.footprint import N_CTX_MULTIPLE, padded_n_ctx, state_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.units import GIB, KIB, MIB, format_gib
from nanorun.plan.machine.hardware import HOST
from nanorun.plan.memory_plan import KV_TYPES, Plan
from nanorun.plan.memory_use import DeviceUse, Settings, device_uses
from nanorun.plan.speed_estimate import estimate_speed

_WIDTH, _HEIGHT = 860, 640
_LEFT, _RIGHT = 72, 150
_PANELS = ((108, 250), (420, 160))  # top and height: memory, speed
_SHORTEST, _LONGEST = 4 * KIB, MIB
_STEPS_PER_DOUBLING = 8
_LABEL_STEP = 15
_COLORS = {GgmlType.F16: "#0f766e", GgmlType.Q8_0: "#2563eb", GgmlType.Q4_0: "#c2410c"}
_INK, _QUIET, _GRID, _LIMIT, _WEIGHTS = "#1f2937", "#6b7280", "#e5e7eb", "#dc2626", "#f1f5f9"
_STYLE = f"""\
text {{ font-family: system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif;
  font-size: 12px; fill: {_INK}; }}
.title {{ font-size: 17px; font-weight: 600; }}
.head {{ font-size: 13px; font-weight: 600; }}
.quiet {{ fill: {_QUIET}; }}
.line {{ fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }}
.beyond {{ stroke-dasharray: 2 5; stroke-width: 1.6; }}
.grid {{ stroke: {_GRID}; stroke-width: 1; }}
.limit {{ stroke: {_LIMIT}; stroke-width: 1.6; stroke-dasharray: 7 4; }}"""


@dataclass(frozen=True, slots=True)
class Series:
    """One type of KV cache over all contexts."""

    type_kv: GgmlType
    n_ctx: tuple[int, ...]
    needed_bytes: tuple[int, ...]
    """What the scarce memory has to hold, with what is kept free."""
    decode_tps: tuple[float, ...]
    """With the context full."""
    longest: int | None
    """The longest context that fits; None if not even the first does."""


def plan_series(plan: Plan) -> list[Series]:
    """Memory and speed over all contexts, for each type of KV cache."""
    contexts = _contexts(plan.shape.arch.n_ctx_train)
    return [_series(plan, type_kv, contexts) for type_kv in KV_TYPES]


def _series(plan: Plan, type_kv: GgmlType, contexts: Sequence[int]) -> Series:
    def settings(n_ctx: int) -> Settings:
        return replace(
            plan.settings, n_ctx=n_ctx, type_k=type_kv, type_v=type_kv,
            checkpoint_bytes=2 * state_bytes(plan.shape.arch), archive_bytes=0,
        )  # fmt: skip

    def uses(n_ctx: int) -> list[DeviceUse]:
        return device_uses(plan.shape, settings(n_ctx), plan.hardware)

    def fits(n_ctx: int) -> bool:
        return all(use.spare_bytes >= 0 for use in uses(n_ctx))

    needed = (sum(u.total_bytes + u.margin_bytes for u in _scarce(uses(n))) for n in contexts)
    speeds = (
        estimate_speed(
            plan.shape, settings(n), plan.hardware, calibration=plan.calibration, n_past=n
        ).decode_tps
        for n in contexts
    )
    low, high = contexts[0] // N_CTX_MULTIPLE, contexts[-1] // N_CTX_MULTIPLE + 1
    longest = None
    if fits(contexts[0]):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * N_CTX_MULTIPLE) else (low, middle)
        longest = low * N_CTX_MULTIPLE
    return Series(type_kv, tuple(contexts), tuple(needed), tuple(speeds), longest)


def _contexts(n_ctx_train: int) -> list[int]:
    last = padded_n_ctx(min(_LONGEST, n_ctx_train))
    first = padded_n_ctx(min(_SHORTEST, max(1, last // 16)))
    n_steps = max(1, round(math.log2(last / first) * _STEPS_PER_DOUBLING))
    steps = (padded_n_ctx(round(first * (last / first) ** (i / n_steps))) for i in range(n_steps))
    return list(dict.fromkeys([*steps, last]))


def _scarce(uses: Sequence[DeviceUse]) -> list[DeviceUse]:
    """The accelerators, or main memory where they have none of their own or are not used."""
    return [use for use in uses if use.name != HOST] or list(uses)


# -- drawing ------------------------------------------------------------------------------------


class _Panel:
    """A coordinate system with its grid: contexts by their logarithm, values from zero."""

    def __init__(self, place: tuple[int, int], contexts: Sequence[int], highest: float) -> None:
        self.top, self.height = place
        self.first, self.last = contexts[0], contexts[-1]
        self.step = _nice_step(highest / 6)
        self.highest = self.step * math.ceil(highest / self.step)

    def x(self, n_ctx: float) -> float:
        """Of a context."""
        share = math.log(n_ctx / self.first) / max(1e-9, math.log(self.last / self.first))
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Of a value."""
        return self.top + self.height * (1 - value / self.highest)

    def grid(self) -> list[str]:
        """Lines, and their labels."""
        parts = []
        for i in range(round(self.highest / self.step) + 1):
            value = i * self.step
            y = self.y(value)
            parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"))
            parts.append(_text(_LEFT - 10, y + 4, f"{value:g}", "quiet", anchor="end"))
        n_ctx = 2 ** math.ceil(math.log2(self.first))
        while n_ctx <= self.last:
            x = self.x(n_ctx)
            parts.append(_line(x, self.top, x, self.top + self.height, "grid"))
            y = self.top + self.height + 18
            parts.append(_text(x, y, _short(n_ctx), "quiet", anchor="middle"))
            n_ctx *= 2
        return parts

    def curve(self, series: Series, values: Sequence[float]) -> list[str]:
        """A series: a line as far as it fits, dots beyond."""
        color = _COLORS[series.type_kv]
        points = list(zip(series.n_ctx, values, strict=True))
        longest = series.longest or 0
        inside = [p for p in points if p[0] <= longest]
        beyond = points[max(0, len(inside) - 1) :]
        parts = [self._path(beyond, f'class="line beyond" stroke="{color}"')] if beyond[1:] else []
        if inside:
            parts.append(self._path(inside, f'class="line" stroke="{color}"'))
        return parts

    def area(self, low: float, high: float, color: str) -> str:
        """A band over all contexts."""
        y, height = self.y(high), self.y(low) - self.y(high)
        width = _WIDTH - _LEFT - _RIGHT
        return (
            f'<rect x="{_LEFT}" y="{y:.1f}" width="{width}" height="{height:.1f}" fill="{color}"/>'
        )

    def _path(self, points: Sequence[tuple[int, float]], attributes: str) -> str:
        path = " ".join(f"{self.x(n):.1f},{self.y(v):.1f}" for n, v in points)
        return f'<polyline points="{path}" {attributes}/>'


def render_plot(plan: Plan) -> str:
    """The picture as an SVG document."""
    series = plan_series(plan)
    uses = _scarce(plan.uses)
    free = sum(use.free_bytes for use in uses)
    contexts = series[0].n_ctx
    needed = [n / GIB for s in series for n in s.needed_bytes]
    memory = _Panel(_PANELS[0], contexts, 1.06 * max(free / GIB, *needed))
    speed = _Panel(_PANELS[1], contexts, 1.06 * max(max(s.decode_tps) for s in series))
    where = " and ".join("main memory" if use.name == HOST else use.name for use in uses)
    parts = [
        *_titles(plan, where),
        *_memory_panel(memory, series, sum(use.weights_bytes for use in uses), free, where),
        *_speed_panel(speed, series, plan),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        f' width="{_WIDTH}" height="{_HEIGHT}" role="img">\n<style>\n{_STYLE}\n</style>\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _titles(plan: Plan, where: str) -> list[str]:
    s, shape = plan.settings, plan.shape
    recipe = f" ({shape.recipe})" if shape.recipe else ""
    title = f"{shape.name}{recipe} on {plan.hardware.name}"
    placed = f", experts of blocks below {s.n_cpu_moe} in main memory" if s.n_cpu_moe else ""
    fixed = (
        f"n_ubatch {s.n_ubatch}, {s.n_seq_max} sequences{placed}, by type of the KV cache;"
        " dotted where it does not fit"
    )
    return [
        _text(24, 34, title, "title"),
        _text(24, 55, fixed, "quiet"),
        _text(24, _PANELS[0][0] - 14, f"Needed of {where}, GiB, with what is kept free", "head"),
        _text(24, _PANELS[1][0] - 14, "Decode speed with the context full, t/s", "head"),
        _text((_WIDTH - _RIGHT + _LEFT) / 2, _HEIGHT - 16, "context, tokens", "quiet", "middle"),
    ]


def _memory_panel(
    panel: _Panel, series: Sequence[Series], weights: int, free: int, where: str
) -> list[str]:
    values = {s.type_kv: [n / GIB for n in s.needed_bytes] for s in series}
    limit = panel.y(free / GIB)
    parts = [panel.area(0, weights / GIB, _WEIGHTS), *panel.grid()]
    if weights > panel.highest * GIB / 10:
        text = f"weights {format_gib(weights)}"
        parts.append(_text(_LEFT + 10, panel.y(weights / GIB) + 18, text, "quiet"))
    parts.append(_line(_LEFT, limit, _WIDTH - _RIGHT, limit, "limit"))
    text = f"{format_gib(free)} of {where} free"
    parts.append(_text(_LEFT + 10, limit - 6, text, color=_LIMIT))
    for one in series:
        parts += panel.curve(one, values[one.type_kv])
        if one.longest is not None and one.longest < one.n_ctx[-1]:
            parts.append(_crossing(panel, one, values[one.type_kv]))
    labels = [(panel.y(values[s.type_kv][-1]), _fit_text(s), _COLORS[s.type_kv]) for s in series]
    return parts + _labels(labels)


def _speed_panel(panel: _Panel, series: Sequence[Series], plan: Plan) -> list[str]:
    parts = panel.grid()
    for one in series:
        parts += panel.curve(one, one.decode_tps)
    share = plan.speed.uncertainty
    parts.append(
        _text(_WIDTH - _RIGHT - 8, panel.top + 14, f"estimates, give or take {share:.0%}", "quiet",
              "end")
    )  # fmt: skip
    labels = [
        (panel.y(tps), f"{s.type_kv.label}: {tps:.{tps < 10:d}f} t/s", _COLORS[s.type_kv])
        for s in series
        for tps in s.decode_tps[-1:]
    ]
    return parts + _labels(labels)


def _fit_text(series: Series) -> str:
    label = series.type_kv.label
    if series.longest is None:
        return f"{label}: does not fit"
    return f"{label}: to {_short(series.longest)}"


def _crossing(panel: _Panel, series: Series, values: Sequence[float]) -> str:
    """A mark where the memory is full."""
    assert series.longest is not None
    i = next(i for i, n_ctx in enumerate(series.n_ctx) if n_ctx > series.longest)
    before, after = series.n_ctx[i - 1], series.n_ctx[i]
    share = (series.longest - before) / (after - before)
    value = values[i - 1] + share * (values[i] - values[i - 1])
    return (
        f'<circle cx="{panel.x(series.longest):.1f}" cy="{panel.y(value):.1f}" r="4.2"'
        f' fill="#ffffff" stroke="{_COLORS[series.type_kv]}" stroke-width="2.2"/>'
    )


def _labels(labels: list[tuple[float, str, str]]) -> list[str]:
    """Names at the lines' ends, moved apart where they would overlap."""
    parts, lowest = [], -math.inf
    for y, text, color in sorted(labels):
        lowest = max(y, lowest + _LABEL_STEP)
        parts.append(_text(_WIDTH - _RIGHT + 10, lowest + 4, text, color=color))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _text(
    x: float, y: float, text: str, style: str = "", anchor: str = "start", color: str = ""
) -> str:
    attributes = f' class="{style}"' if style else ""
    attributes += f' style="fill: {color}"' if color else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{escape(text)}</text>'


def _short(n_ctx: int) -> str:
    """`8K`, `762K`, `1M`."""
    if n_ctx >= MIB:
        return f"{n_ctx / MIB:g}M"
    return f"{n_ctx // KIB}K" if n_ctx >= KIB else str(n_ctx)


def _nice_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least that much."""
    power = 10.0 ** math.floor(math.log10(max(least, 1e-6)))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * 0.999)
