"""Figures: functions from plain data to a Matplotlib figure."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from utils import names
from utils.checkpoint import write_atomic
from utils.run_folder import RunFolder

Rows = list[dict[str, Any]]
Measure = Callable[[dict[str, Any]], dict[str, float]]  # from a row to a value by name
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: safe for colour-blind readers


def save_figure(figure: Figure, path: Path) -> None:
    """In the format that the path's ending names. Raises `write_atomic`'s FarError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks: boxes, no news
        write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150, bbox_inches="tight"))


def draw_curves(run: RunFolder) -> None:
    """curves.png in a run's folder, from its log."""
    if run.context.main and (rows := run.rows()):
        save_figure(training_curves(rows), run.path / "curves.png")


LOG_TICKS = {20: (1, 2, 3, 5, 7), 300: (1, 2, 5), np.inf: (1,)}  # up to this ratio of ends, in each decade


def plain(value: float, _: Any = None) -> str:
    """A number as a person writes it on an axis: 7.25, 0.002, 4,097, 5e−5."""
    number, _, power = f"{value:,.6g}".partition("e")
    return f"{number}e{int(power)}".replace("-", "−") if power else number.replace("-", "−")


def logarithmic(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic scale with plain ticks, where the values are positive and span more than threefold."""
    low, high = min(values := list(values), default=1), max(values, default=1)
    if not 0 < 3 * low < high:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    subs = next(subs for most, subs in LOG_TICKS.items() if high < most * low)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


AROUND = [(r * np.cos(a), r * np.sin(a)) for r, a in product((10, 14, 20, 28), np.radians(range(45, 405, 45)))]


def label_points(axes: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Writes each text (x, y, text) beside its point, where it covers no marker, no line and no other text."""
    axes.figure.draw_without_rendering()  # settles the limits
    ink = []
    for line in axes.lines:
        found = axes.transData.transform(np.column_stack(line.get_data(orig=False)).astype(float))
        ink += [found + step for step in product((-4, 0, 4), repeat=2)]  # a marker's extent
        ink += [np.linspace(*ends, 60) for ends in pairwise(found)] if line.get_linestyle() != "None" else []
    ink, boxes = np.concatenate(ink), []
    inside = axes.get_window_extent()
    for x, y, text in labels:
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8, ha="center", va="center")
        note.set_in_layout(False)

        def covered(place: tuple[float, float], note=note) -> int:
            note.set_position(place)
            box = note.get_window_extent()
            out = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            return box.count_contains(ink) + 100 * box.count_overlaps(boxes) + 50 * (not out)

        note.set_position(min(AROUND, key=covered))
        boxes.append(note.get_window_extent())


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend over all panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() // 2)))
    figure.legend(handles, labels, fontsize=8, ncols=columns, loc="outside upper center", frameon=False)


def _by_stage(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Stages in the order they ran, each with its rows, `x` counting epochs over all stages."""
    begun = 0
    for _, found in groupby(rows, key=lambda row: row["stage_index"]):
        stage = [{**row, "x": begun + row["epoch"]} for row in found]
        begun = stage[-1]["x"]
        yield stage[0]["stage"], stage


def _losses(row: dict[str, Any]) -> dict[str, float]:
    """The lines of a row in the loss panel: the sum that trains, its terms where there are several, evaluation's."""
    terms = {name: value for name, value in row["train"].items() if name in names.TERMS}
    total = {"training loss": row["train"]["loss"]} if row["train"] else {}
    seen = {"evaluation cross entropy": row["val"]["loss"]} if row["val"] else {}
    return {**total, **(terms if len(terms) > 1 else {}), **seen}


def _accuracies(row: dict[str, Any]) -> dict[str, float]:
    return {f"top-{k}": row["val"][f"acc{k}"] for k in (1, 5)} if row["val"] else {}


def training_curves(rows: Rows) -> Figure:
    """Losses, accuracy and the rate at each epoch's end over all epochs: a line a stage and loss."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    stages = list(_by_stage(rows))
    _draw_stages(loss, stages, "loss", _losses)
    _draw_stages(accuracy, stages, "accuracy (%)", _accuracies)
    _draw_stages(rate, stages, "learning rate", lambda row: {"rate": row["lr"]} if row["train"] else {})
    logarithmic(loss.yaxis, [value for row in rows for value in _losses(row).values()])
    rate.yaxis.set_major_formatter(FuncFormatter(plain))
    return figure


def _draw_stages(axes: Axes, stages: list[tuple[str, Rows]], label: str, measure: Measure) -> None:
    """A line a stage and measured name, a colour a name; the names stand under the panel."""
    colours = {"training loss": COLOURS[0], "evaluation cross entropy": COLOURS[1]} if label == "loss" else {}
    for _, stage in stages:
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in stage:
            for name, value in measure(row).items():
                lines.setdefault(name, []).append((row["x"], value))
        for name, points in lines.items():
            known = axes.get_legend_handles_labels()[1]
            style = {"ls": "--" if name.startswith("eval") else "-", "marker": "." if len(points) < 3 else ""}
            colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
            axes.plot(*zip(*points, strict=True), color=colour, label=None if name in known else name, **style)
    axes.set(xlabel="epoch" if len(stages) == 1 else "epoch, over all stages", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(colours) > 1:
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    _name_stages(axes, stages)


def _name_stages(axes: Axes, stages: list[tuple[str, Rows]]) -> None:
    """Over the panel, each stage's name; lines part them."""
    spans = [(name, stage[0]["x"], stage[-1]["x"]) for name, stage in stages]
    for _, begin, _ in spans[1:]:
        axes.axvline(begin, color="0.8", lw=0.8, zorder=0)
    above = axes.secondary_xaxis("top")
    above.set_xticks([(begin + end) / 2 for _, begin, end in spans], [name for name, *_ in spans])
    narrowest = min(end - begin for _, begin, end in spans) / max(1, spans[-1][2])
    above.tick_params(length=0, labelsize=8, rotation=90 if narrowest < 0.03 * max(len(n) for n, *_ in spans) else 0)


def fidelity_by_block(reports: dict[str, dict[str, Any]]) -> Figure:
    """How far a student's blocks are from its teacher's, a line per label (before, after, pruned)."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("z_similarity", "output_error"),
        ("cosine similarity of z", "relative error of outputs"),
        strict=True,
    ):
        for k, (name, report) in enumerate(reports.items()):
            style = {"color": COLOURS[k % len(COLOURS)], "marker": "osD^v*"[k % 6], "clip_on": False, "zorder": 3}
            axes.plot(range(len(report[key])), report[key].values(), label=name, **style)
        axes.set_xticks(range(len(report[key])), report[key])
        axes.set(xlabel="block", ylabel=label)
        axes.grid(axis="y", color="0.9")
    cosine, error = figure.axes
    cosine.set_ylim(min(0, cosine.get_ylim()[0]), 1)
    error.set_ylim(0)
    legend_above(figure, cosine)
    return figure


def pruning_curves(steps: list[dict[str, float]], reg: int) -> Figure:
    """Loss, Hoyer-square and share of weak units over the steps of a regularized training."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, (key, label) in zip(
        figure.subplots(1, 3),
        (
            ("loss", f"training loss (--reg {reg})"),
            ("hoyer_square", "Hoyer-square of the units"),
            ("sparsity", "share of weak units"),
        ),
        strict=True,
    ):
        axis.plot([row[key] for row in steps], color=COLOURS[0], lw=1)
        axis.set(xlabel="recorded step", ylabel=label)
        axis.ticklabel_format(useOffset=False)
    return figure


def kept_units(units: dict[str, list[list[int]]], full: int) -> Figure:
    """Heat map of u[h][r]: a row a block, a column a head and direction; `full` units were there before pruning."""
    blocks = sorted(units, key=int)
    table = np.array([np.ravel(units[b]) for b in blocks])
    figure = Figure(figsize=(1.8 + 0.45 * table.shape[1], 1.2 + 0.32 * len(blocks)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(table, cmap="viridis", vmin=0, vmax=full, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axis.text(
            column, row, value, ha="center", va="center", fontsize=7, color="white" if value < 0.6 * full else "black"
        )
    axis.set_xticks(range(table.shape[1]), [f"{k // 2} {'→←'[k % 2]}" for k in range(table.shape[1])], fontsize=7)
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axis.set(xlabel="head; → reads forward, ← backward", ylabel="block")
    figure.colorbar(image, label=f"kept units of {full}")
    return figure


def sweep_curve(points: list[dict], unpruned: dict, teacher: dict | None) -> Figure:
    """Top-1 against parameters at each keep ratio, with the unpruned FAR and the teacher marked."""
    points = sorted(points, key=lambda p: p["parameters"])
    rows = {"pruned FAR, by keep ratio": points, "unpruned FAR": [unpruned], "teacher (attention)": [teacher]}
    rows = {name: [(row["parameters"] / 1e6, row["acc1"]) for row in found if row] for name, found in rows.items()}
    return _trade(rows, [f"{p['keep_ratio']:g}" for p in points], "parameters (millions)")


def _trade(rows: dict[str, list[tuple[float, float]]], texts: list[str], cost: str) -> Figure:
    """Top-1 against a cost: (cost, top-1) by name. The first name's points are joined, and `texts` stand beside."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for k, (name, points) in enumerate((name, points) for name, points in rows.items() if points):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": "osDv^*"[k % 6], "ls": "" if k else "-"}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.margins(0.12)
    axes.set(xlabel=cost, ylabel="top-1 (%)")
    axes.ticklabel_format(useOffset=False)
    legend_above(figure, axes)
    first = next(iter(rows.values()))
    label_points(axes, [(x, y, text) for (x, y), text in zip(first, texts, strict=True)])
    return figure


def latency_by_tokens(curve: dict[str, list[dict]]) -> Figure:
    """Time and extra memory of one layer against the number of tokens, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key, scale, label in zip(
        figure.subplots(1, 2),
        ("median_ms", "peak_bytes"),
        (1, 1e6),
        ("time a layer (ms)", "peak extra memory (MB)"),
        strict=True,
    ):
        for k, (name, points) in enumerate(curve.items()):
            x, y = [p["tokens"] for p in points], [p[key] / scale for p in points]
            axes.plot(x, y, marker="osD^v*"[k % 6], color=COLOURS[k % len(COLOURS)], label=name)
        axes.set(xscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(x, map(plain, x), fontsize=8)
        axes.set_xticks([], minor=True)
        logarithmic(axes.yaxis, [p[key] / scale for points in curve.values() for p in points])
    legend_above(figure, axes)
    return figure


def accuracy_by_latency(rows: list[dict]) -> Figure:
    """Top-1 against the time for one image; FAR and its pruned sizes are joined by a line."""
    sizes = [row for row in rows if row["name"].startswith("FAR fused") and "bfloat16" not in row["name"]]
    places = {"FAR fused, by keep ratio": [(row["median_ms"], row["acc1"]) for row in sizes]}
    places |= {row["name"]: [(row["median_ms"], row["acc1"])] for row in rows if row not in sizes}
    return _trade(places, [row["name"].partition("keep ")[2] or "1" for row in sizes], "one image (ms)")
