"""The report's plots: each drawn twice, as SVG that follows the reader's theme and as PNG for `report.md`."""

import html
import io
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.results import ANCHORS, TRAINED, Score, System

CLAIM = 0.85  # ">= 85 %" is said only where the lower bound of the 95 % interval reaches it

# The SVG is drawn in marker colours that become CSS variables, so that one drawing follows the reader's theme.
LIGHT = {
    "ink": "#1c1e21", "muted": "#646b73", "grid": "#dcdfe3", "sft": "#955600", "dpo": "#1d5cb8", "ppo": "#006e59",
    "other1": "#84389f", "other2": "#ad2e47",
}  # fmt: skip
MARKERS = {name: f"#0101{i + 1:02x}" for i, name in enumerate(LIGHT)}


class Chart(NamedTuple):
    """A plot: `name` becomes the PNG's file name, `svg` stands in the page."""

    name: str
    caption: str
    svg: Markup
    png: bytes


def hue_of(system: System, systems: list[System]) -> str:
    """The key of LIGHT that a system is drawn in, the same in every plot."""
    if system.name in LIGHT:
        return system.name
    if system.name in (*ANCHORS, "base"):
        return "muted"
    others = sorted({s.name for s in systems} - set(TRAINED) - set(ANCHORS))
    return f"other{others.index(system.name) % 2 + 1}"


def _chart(name: str, caption: str, draw: Callable[[Axes, dict[str, str]], None], height: float) -> Chart:
    """[`_panels`] of one."""
    return _panels(name, caption, [draw], height)


def _panels(name: str, caption: str, draws: list[Callable[[Axes, dict[str, str]], None]], height: float) -> Chart:
    """Draw twice, one panel above the other: for the page as SVG in CSS variables, and as PNG for `report.md`."""
    name = re.sub(r"\W+", "_", name)  # folder names get into it, and it becomes a file name and ids
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
        "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        drawn = {}
        for kind, palette in (("svg", MARKERS), ("png", LIGHT)):
            figure = Figure(figsize=(4.4, height), layout="constrained")
            column = figure.subplots(len(draws), 1, sharex=True, squeeze=False)[:, 0]
            for axes, draw in zip(column, draws, strict=True):
                axes.tick_params(colors=palette["muted"], labelcolor=palette["ink"], width=0.6, length=3)
                for spine in axes.spines.values():
                    spine.set_color(palette["muted"])
                axes.set_axisbelow(True)
                draw(axes, palette)
            buffer = io.BytesIO()
            if kind == "svg":
                figure.patch.set_visible(False)
                for axes in column:
                    axes.patch.set_visible(False)
                figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            else:
                figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
            drawn[kind] = buffer.getvalue()
    return Chart(name, caption, _inline(drawn["svg"].decode(), name, caption), drawn["png"])


def _inline(svg: str, name: str, caption: str) -> Markup:
    """A matplotlib SVG as a page element: themed by CSS variables, its ids its own, and no address in it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # a `*` rule that would reach the whole page
    for key, marker in MARKERS.items():
        svg = re.sub(rf"(fill|stroke): {marker}\b", rf"\1: var(--{key})", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    head = f'<svg class="chart" {view[0]} role="img" aria-label="{html.escape(caption)}">'
    return Markup(head + svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href"))


def bars(name: str, caption: str, scored: list[tuple[System, Score]], systems: list[System]) -> Chart:
    """A bar a system, 0 to 100 %, with its interval."""

    def draw(axes: Axes, palette: dict[str, str]) -> None:
        axes.axvline(100 * CLAIM, color=palette["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
        for place, (system, score) in enumerate(scored):
            hue = palette[hue_of(system, systems)]
            axes.barh(place, 100 * score.value, height=0.5, color=hue, alpha=0.35)
            axes.plot([100 * score.value] * 2, [place - 0.25, place + 0.25], color=hue, linewidth=2)
            if score.low is not None and score.high is not None:
                axes.plot([100 * score.low, 100 * score.high], [place, place], color=palette["ink"], linewidth=1.4)
        axes.set_yticks(range(len(scored)), [system.label for system, _ in scored])
        axes.invert_yaxis()
        axes.set_xlim(0, 100.5)
        axes.set_xticks([0, 25, 50, 85, 100])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return _chart(name, caption, draw, 0.55 + 0.24 * len(scored))


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Label heights at least `gap` apart, in the order of `wanted` and as near to it as one pass up and down gets."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    overshoot = max(0.0, placed[order[-1]] - 100) if order else 0.0
    if overshoot:
        placed[order[-1]] -= overshoot
        for after, before in pairwise(order[::-1]):
            placed[before] = min(placed[before], placed[after] - gap)
    return placed


def turn_lines(
    name: str, caption: str, series: list[tuple[System, list[tuple[int, Score]]]], systems: list[System]
) -> Chart:
    """A line a system over the exchanges before the question, each named where it ends."""
    turns = sorted({turn for _, points in series for turn, _ in points})

    def draw(axes: Axes, palette: dict[str, str]) -> None:
        width = max(turns[-1] - turns[0], 1)
        ends = _spread([100 * points[-1][1].value for _, points in series], gap=7.5)
        for place, ((system, points), end) in enumerate(zip(series, ends)):
            hue = palette[hue_of(system, systems)]
            style = (0, (2, 2)) if system.name in (*ANCHORS, "base") else "solid"
            dodge = 0.012 * width * (place - len(series) / 2)  # intervals of equal systems would hide each other
            axes.plot(
                [turn + dodge for turn, _ in points],
                [100 * score.value for _, score in points],
                color=hue, linewidth=1.5, linestyle=style, marker="o", markersize=3.5,
            )  # fmt: skip
            for turn, score in points:
                if score.low is not None and score.high is not None:
                    axes.plot([turn + dodge] * 2, [100 * score.low, 100 * score.high], color=hue, linewidth=1)
            axes.annotate(
                system.label, (points[-1][0] + dodge, 100 * points[-1][1].value), (turns[-1] + 0.12 * width, end),
                color=hue, va="center", arrowprops={"arrowstyle": "-", "color": palette["grid"], "linewidth": 0.6},
            )  # fmt: skip
        axes.set_ylim(-2, 102)
        axes.set_yticks([0, 25, 50, 85, 100])
        axes.grid(axis="y", color=palette["grid"], linewidth=0.6)
        axes.set_xticks(turns)
        axes.set_xlim(turns[0] - 0.08 * width, turns[-1] + 0.12 * width)
        axes.set_xlabel("exchanges before the question", color=palette["muted"])

    return _chart(name, caption, draw, 3.0)


Lines = dict[str, list[tuple[float, float]]]


def curve(name: str, caption: str, lines: Lines) -> Chart:
    """Lines over steps; the held-out line, where there is one, in full ink."""
    return stacked(name, caption, {"": lines}, [], 2.3)


def stacked(
    name: str, caption: str, panels: dict[str, Lines], measured: list[tuple[float, Score]], height: float
) -> Chart:
    """Panels over the same steps, by title.

    Args:
        panels: lines of each; the held-out ones in full ink.
        measured: shares with their intervals, drawn in percent into the last panel.
    """
    return _panels(
        name, caption,
        [_over_steps(title, lines, measured if place == len(panels) - 1 else [], place == len(panels) - 1)
         for place, (title, lines) in enumerate(panels.items())],
        height,
    )  # fmt: skip


def _over_steps(
    title: str, lines: Lines, measured: list[tuple[float, Score]], lowest: bool
) -> Callable[[Axes, dict[str, str]], None]:
    def draw(axes: Axes, palette: dict[str, str]) -> None:
        for label, points in lines.items():
            held_out = label == "held-out"
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=palette["ppo" if held_out else "muted"],
                linewidth=1.8 if held_out else 1.0,
                marker="o" if held_out or len(points) == 1 else None,
                markersize=3,
                label=label,
            )
        axes.grid(axis="y", color=palette["grid"], linewidth=0.6)
        for step, score in measured:
            if score.low is not None and score.high is not None:
                axes.plot([step] * 2, [100 * score.low, 100 * score.high], color=palette["ink"], linewidth=1.4)
            axes.plot([step], [100 * score.value], color=palette["ppo"], marker="D", markersize=4)
        if measured:
            axes.set_ylim(-4, 104)
        if title:
            axes.set_title(title, loc="left", color=palette["ink"])
        if lowest:
            axes.set_xlabel("step", color=palette["muted"])
        axes.margins(x=0.02)
        if len(lines) > 1:
            axes.legend(
                frameon=False,
                labelcolor=palette["ink"],
                loc="lower right",
                bbox_to_anchor=(1, 1),
                borderaxespad=0,
                ncols=2,
            )

    return draw
