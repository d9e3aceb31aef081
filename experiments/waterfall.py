"""A waterfall: what each of several steps saves, from the first whole to the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FULL, SAVED, LOST = "#3b6fb6", "#2f9e6e", "#c0392b"


def waterfall(
    steps: Sequence[tuple[str, str, float]], title: str, end: str, where: str | Path | Any, unit: str = "ms"
) -> None:
    """Draw steps (label, file:line, cost): the first as a whole bar, what each next one saves, what remains as `end`.

    `where` is a file or axes.
    """
    if not isinstance(where, str | Path):
        _draw(steps, title, end, where, unit)
        return
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    figure = Figure(figsize=(9, 1.6 + 0.42 * (len(steps) + 1)), dpi=120, layout="constrained")
    _draw(steps, title, end, figure.add_subplot(), unit)
    figure.savefig(where)


def _draw(steps: Sequence[tuple[str, str, float]], title: str, end: str, axes: Any, unit: str) -> None:
    labels, widest = [], max(ms for *_, ms in steps)
    (label, place, before), last = steps[0], steps[-1][2]
    bars = [(label, place, 0.0, before, FULL, f"{before:,.1f} {unit}")]
    for label, place, ms in steps[1:]:
        text = f"{ms - before:+,.1f} {unit}"
        bars.append((label, place, min(ms, before), abs(ms - before), SAVED if ms <= before else LOST, text))
        before = ms
    bars.append(
        (
            end,
            "",
            0.0,
            last,
            FULL,
            f"{last:,.1f} {unit}, {steps[0][2] / last:.1f}x {'as fast' if unit == 'ms' else 'less'}",
        )
    )
    for row, (label, place, left, width, colour, text) in enumerate(bars):
        axes.barh(row, width, left=left, color=colour, height=0.62)
        axes.text(left + width + 0.01 * widest, row, text, va="center", fontsize=9, color="0.25")
        labels.append(f"{label}\n{place}" if place else label)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.25)
    axes.set_xlabel(f"{unit} a step", color="0.35")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="0.93", axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
