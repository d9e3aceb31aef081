"""What vs_peers.py says of its results: lines, tables and a picture."""

from __future__ import annotations

import io
import statistics
from typing import Any

MODELS = {"alexnet": "AlexNet", "resnet18": "ResNet-18"}
MODES = {"train": "training", "infer": "inference"}
DIRECTIONS = ("forward", "grad_x", "grad_w")
LAYER = 40  # characters of a layer's name and direction
OURS, THEIRS = "#d1495b", "#8d99ae"

Row = dict[str, Any]


def with_figures(row: Row) -> Row:
    """The row with the median and the minimum of its seconds."""
    return {**row, "median": statistics.median(row["seconds"]), "minimum": min(row["seconds"])}


def best(rows: list[Row], *peers: str, figure: str = "median") -> Row | None:
    """The row with the smallest median, or minimum, of some peers or of all but ours."""
    others = [row for row in rows if (row["peer"] in peers if peers else row["peer"] != "ours")]
    return min(others, key=lambda row: row[figure], default=None)


def label(row: Row, result: dict) -> str:
    """`PyTorch (channels_last)`."""
    return f"{result['peers'][row['peer']]['title']} ({row['setting']})"


def agreement(rows: list[Row], tolerances: dict[str, float]) -> str:
    """The largest differences from ours, and what is allowed."""
    lines = ["  differences from nanocnn, relative:"]
    for row in rows:
        words = [
            f"{what} {difference:.1e} ({where}; allowed {tolerances[what]:.0e})"
            for what, (difference, where) in row["check"].items()
        ]
        if words:
            lines.append(f"    {row['peer']} ({row['setting']}): {', '.join(words)}")
    return "\n".join(lines) if len(lines) > 1 else "  nobody to compare with"


def network_table(entry: dict, result: dict) -> str:
    """One network in one mode: a line for each contender, then what ours, in its best setting, takes of the best."""
    rows, batch = entry["rows"], result["batch"]
    width = max(len(label(row, result)) for row in rows)
    lines = [f"  {'':{width}}  median ms  minimum  images/s  memory MB  ours / theirs: median, minimum"]
    ours = best(rows, "ours")
    for row in rows:
        ratio = ""
        if ours and row is not ours:
            ratio = f"{ours['median'] / row['median']:.2f}, {ours['minimum'] / row['minimum']:.2f}"
        milliseconds = f"{row['median'] * 1e3:9.2f}  {row['minimum'] * 1e3:7.2f}  {batch / row['median']:8,.0f}"
        lines.append(f"  {label(row, result):{width}}  {milliseconds}  {row['memory'] / 1e6:9,.0f}  {ratio}".rstrip())
    for title, row in (("the best of PyTorch", best(rows, "pytorch")), ("the best of all", best(rows))):
        if row and ours:
            lines.append(f"  ours / {title}, {label(row, result)}: {ours['median'] / row['median']:.2f}")
    return "\n".join(lines)


def layer_header(result: dict) -> str:
    """The columns of layer_line(): each framework in its best setting, then ours over the best of the others."""
    names = "".join(f"{peer['title']:>{_column(peer)}}" for peer in result["peers"].values())
    what = "median ms, in the best setting"
    return f"\n{what:{LAYER + len(names)}}  ours / the best\n{'':{LAYER}}{names}  median  minimum"


def layer_line(entry: dict, result: dict) -> str:
    """One layer in one direction."""
    line = f"{entry['layer']:{LAYER - 8}}{entry['direction']:8}"
    for name, peer in result["peers"].items():
        row = best(entry["rows"], name)
        line += f"{row['median'] * 1e3:{_column(peer)}.2f}" if row else " " * _column(peer)
    for figure, width in (("median", 8), ("minimum", 9)):
        ours, other = best(entry["rows"], "ours", figure=figure), best(entry["rows"], figure=figure)
        line += f"{ours[figure] / other[figure]:{width}.2f}" if ours and other else ""
    return line


def _column(peer: dict) -> int:
    """The width of a framework's column."""
    return max(7, len(peer["title"])) + 2


def picture(result: dict) -> bytes:
    """A PNG: bars of the medians of each network and mode, or ours over the best of the others for each layer."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    entries, layers = result["networks"], result["layers"]
    if layers:
        figure = Figure(figsize=(9, 1.5 + 0.45 * len({entry["layer"] for entry in layers})), layout="constrained")
        _layer_panel(figure.subplots(), layers)
    else:
        rows = max(len(entry["rows"]) for entry in entries)
        columns = min(2, len(entries))
        lines = -(-len(entries) // columns)
        figure = Figure(figsize=(6.5 * columns, lines * (1 + 0.35 * rows)), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, entry in zip(panels, entries, strict=False):
            _network_panel(panel, entry, result)
        for panel in panels[len(entries) :]:
            panel.set_axis_off()
    processor = result["machine"]["processor"]["name"]
    figure.suptitle(f"{processor}, {result['threads']} threads, batch {result['batch']}, float32", fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _network_panel(panel, entry, result):
    rows = entry["rows"][::-1]  # the first bar is drawn at the bottom
    medians = [row["median"] * 1e3 for row in rows]
    colours = [OURS if row["peer"] == "ours" else THEIRS for row in rows]
    bars = panel.barh([label(row, result) for row in rows], medians, color=colours)
    panel.bar_label(bars, [f"{ms:,.3g}" if ms < 100 else f"{ms:,.0f}" for ms in medians], padding=3, fontsize=8)
    panel.plot([row["minimum"] * 1e3 for row in rows], range(len(rows)), "|", color="black")
    panel.set_title(
        f"{MODELS[entry['model']]}, {MODES[entry['mode']]}: median ms (tick: minimum)", fontsize=10, loc="left"
    )
    _tidy(panel)
    panel.set_xlim(0, 1.15 * max(medians))


def _layer_panel(panel, layers):
    names = list(dict.fromkeys(entry["layer"] for entry in layers))
    for i, (direction, colour) in enumerate(zip(DIRECTIONS, ("#d1495b", "#edae49", "#66a182"), strict=True)):
        some = [entry for entry in layers if entry["direction"] == direction and best(entry["rows"])]
        ratios = [entry["rows"][0]["median"] / best(entry["rows"])["median"] for entry in some]
        places = [names.index(entry["layer"]) + 0.27 * (i - 1) for entry in some]
        panel.barh(places, ratios, height=0.25, color=colour, label=direction)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    panel.set_title("ours / the best of the others: below 1 is faster", fontsize=10, loc="left")
    panel.legend(fontsize=8, frameon=False)
    _tidy(panel)


def _tidy(panel):
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
