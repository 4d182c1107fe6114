"""Figures: functions from plain data to a Matplotlib figure."""

import warnings
from collections.abc import Iterable
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from utils import names
from utils.checkpoint import write_atomic

# Okabe and Ito's colours, safe for colour-blind readers, each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = [{"color": colour, "marker": marker} for colour, marker in zip(COLOURS, "osD^v*", strict=True)]


def save_figure(figure: Figure, path: Path) -> None:
    """In the format that the path's suffix names. Raises `write_atomic`'s FarError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks: boxes, no news
        write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150, bbox_inches="tight"))


def empty_panels(width: float, height: float, xlabel: str, *ylabels: str) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels side by side, one for each ylabel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, len(ylabels), squeeze=False)[0])
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, panels


def plain(value: float, _: Any = None) -> str:
    """A number as a person writes it on an axis: 7.25, 0.002, 4,097, 5e−5."""
    number, _, power = f"{value:,.6g}".partition("e")
    return f"{number}e{int(power)}".replace("-", "−") if power else number.replace("-", "−")


def logarithmic(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic scale with plain ticks, where the values are positive and span more than threefold."""
    low, high = min(values := list(values), default=1), max(values, default=1)
    if 0 < 3 * low < high:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend over all panels, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() // 2)))
    figure.legend(handles, labels, fontsize=8, ncols=columns, loc="outside upper center", frameon=False)


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """Losses, accuracy and learning rate of a log's rows over all epochs; grey lines part the stages, named above."""

    def losses(row: dict[str, Any]) -> dict[str, float]:
        terms = {name: value for name, value in row["train"].items() if name in names.TERMS}
        values = {"training loss": row["train"]["loss"]} if row["train"] else {}
        values |= terms if len(terms) > 1 else {}
        return values | ({"evaluation cross entropy": row["val"]["loss"]} if row["val"] else {})

    measures = {
        "loss": losses,
        "accuracy (%)": lambda row: {f"top-{k}": row["val"][f"acc{k}"] for k in (1, 5)} if row["val"] else {},
        "learning rate": lambda row: {"rate": row["lr"]} if row["train"] else {},
    }
    stages = [list(group) for _, group in groupby(rows, key=lambda row: row["stage_index"])]
    begins = [0, *accumulate(stage[-1]["epoch"] for stage in stages)]
    xlabel = "epoch" if len(stages) == 1 else "epoch, over all stages"
    figure, panels = empty_panels(11, 3.8, xlabel, *measures)
    for axes, measure in zip(panels, measures.values(), strict=True):
        colours: dict[str, str] = {}
        for begin, stage in zip(begins, stages, strict=False):
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in stage:
                for name, value in measure(row).items():
                    lines.setdefault(name, []).append((begin + row["epoch"], value))
            for name, points in lines.items():
                style = {"ls": "--" if name.startswith("eval") else "-", "marker": "." if len(points) < 3 else ""}
                style["label"] = None if name in colours else name  # once in the legend
                style["color"] = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
                axes.plot(*zip(*points, strict=True), **style)
            if begin:
                axes.axvline(begin, color="0.8", lw=0.8, zorder=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(colours) > 1:
            axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
        above = axes.secondary_xaxis("top")
        middles = [(begin + end) / 2 for begin, end in zip(begins, begins[1:], strict=False)]
        above.set_xticks(middles, [stage[0]["stage"] for stage in stages])
        above.tick_params(length=0, labelsize=8, rotation=0 if len(stages) < 4 else 90)
    loss, _, rate = panels
    logarithmic(loss.yaxis, [value for row in rows for value in losses(row).values()])
    rate.yaxis.set_major_formatter(FuncFormatter(plain))
    return figure


def fidelity_by_block(reports: dict[str, dict[str, Any]]) -> Figure:
    """How far a student's blocks are from its teacher's, a line a report by name (before, after, pruned)."""
    labels = ("cosine similarity of z", "relative error of outputs")
    figure, (cosine, error) = empty_panels(9, 3.3, "block", *labels)
    for axes, key in ((cosine, "z_similarity"), (error, "output_error")):
        for k, (name, report) in enumerate(reports.items()):
            blocks, values = range(len(report[key])), report[key].values()
            axes.plot(blocks, values, label=name, clip_on=False, zorder=3, **STYLES[k % 6])
        axes.set_xticks(blocks, report[key])
        axes.grid(axis="y", color="0.9")
    cosine.set_ylim(min(0, cosine.get_ylim()[0]), 1)
    error.set_ylim(0)
    legend_above(figure, cosine)
    return figure


def pruning_curves(steps: list[dict[str, float]], reg: int) -> Figure:
    """Loss, Hoyer-square and share of weak units over the steps of a regularized training."""
    labels = (f"training loss (--reg {reg})", "Hoyer-square of the units", "share of weak units")
    figure, panels = empty_panels(10, 3, "recorded step", *labels)
    for axes, key in zip(panels, ("loss", "hoyer_square", "sparsity"), strict=True):
        axes.plot([row[key] for row in steps], color=COLOURS[0], lw=1)
        axes.ticklabel_format(useOffset=False)
    return figure


def kept_units(units: dict[str, list[list[int]]], full: int) -> Figure:
    """Heat map of u[h][r]: a row a block, a column a head and direction; `full` units were there before pruning."""
    blocks = sorted(units, key=int)
    table = np.array([np.ravel(units[b]) for b in blocks])
    figure = Figure(figsize=(1.8 + 0.45 * table.shape[1], 1.2 + 0.32 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=full, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value < 0.6 * full else "black"
        axes.text(column, row, value, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(table.shape[1]), [f"{k // 2} {'→←'[k % 2]}" for k in range(table.shape[1])], fontsize=7)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axes.set(xlabel="head; → reads forward, ← backward", ylabel="block")
    figure.colorbar(image, label=f"kept units of {full}")
    return figure


def accuracy_by_cost(curve: str, points: list[tuple[float, float, str]], others: dict[str, tuple], cost: str) -> Figure:
    """Top-1 against a cost: points (cost, top-1, text) joined and labelled, others (cost, top-1) by name."""
    figure, (axes,) = empty_panels(6, 4, cost, "top-1 (%)")
    x, y, texts = zip(*sorted(points), strict=True)
    axes.plot(x, y, label=curve, **STYLES[0])
    for place in zip(texts, x, y, strict=True):
        axes.annotate(place[0], place[1:], (7, -11), textcoords="offset points", fontsize=8)
    for k, (name, place) in enumerate(others.items(), 1):
        axes.plot(*place, label=name, ls="", **STYLES[k % 6])
    axes.margins(0.12)
    axes.ticklabel_format(useOffset=False)
    legend_above(figure, axes)
    return figure


def sweep_curve(points: list[dict], unpruned: dict, teacher: dict | None) -> Figure:
    """Top-1 against parameters at each keep ratio, with the unpruned FAR and the teacher marked."""

    def place(row: dict) -> tuple[float, float]:
        return row["parameters"] / 1e6, row["acc1"]

    others = {"unpruned FAR": place(unpruned)} | ({"teacher (attention)": place(teacher)} if teacher else {})
    labelled = [(*place(point), f"{point['keep_ratio']:g}") for point in points]
    return accuracy_by_cost("pruned FAR, by keep ratio", labelled, others, "parameters (millions)")


def accuracy_by_latency(rows: list[dict]) -> Figure:
    """Top-1 against the time for one image; FAR and its pruned sizes are joined by a line."""
    sizes = [row for row in rows if row["name"].startswith("FAR fused") and "bfloat16" not in row["name"]]
    others = {row["name"]: (row["median_ms"], row["acc1"]) for row in rows if row not in sizes}
    labelled = [(row["median_ms"], row["acc1"], row["name"].partition("keep ")[2] or "1") for row in sizes]
    return accuracy_by_cost("FAR fused, by keep ratio", labelled, others, "one image (ms)")


def latency_by_tokens(curve: dict[str, list[dict]]) -> Figure:
    """Time and extra memory of one layer against the number of tokens, both axes logarithmic."""
    figure, panels = empty_panels(9, 3.8, "tokens", "time a layer (ms)", "peak extra memory (MB)")
    for axes, key, scale in zip(panels, ("median_ms", "peak_bytes"), (1, 1e6), strict=True):
        for k, (name, points) in enumerate(curve.items()):
            x, y = [p["tokens"] for p in points], [p[key] / scale for p in points]
            axes.plot(x, y, label=name, **STYLES[k % 6])
        axes.set(xscale="log")
        axes.set_xticks(x, map(plain, x), fontsize=8)
        axes.set_xticks([], minor=True)
        logarithmic(axes.yaxis, [p[key] / scale for points in curve.values() for p in points])
    legend_above(figure, axes)
    return figure


SCORED = {  # what a ranking's scores are
    "alone": "KL with it alone replaced (nats)",
    "restore": "KL that its attention saves (nats)",
    "greedy": "KL with those before it (nats)",
    "spacing": "turn",
    "entropy": "entropy of attention (nats)",
}


def cost_of_blocks(ranking: Any, chosen: int) -> Figure:
    """A ranking of blocks: a bar a block, filled where it is replaced; what the cheapest of them cost together."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    bars, path = figure.subplots(1, 2)
    blocks = sorted(ranking.scores)
    fills = [COLOURS[0] if i in ranking.order[:chosen] else "white" for i in blocks]
    bars.bar(blocks, [ranking.scores[i] for i in blocks], color=fills, edgecolor=COLOURS[0])
    logarithmic(bars.yaxis, ranking.scores.values())
    bars.set_xticks(blocks)
    for i, tick in zip(blocks, bars.get_xticklabels(), strict=True):
        tick.set(fontweight="bold" if i in ranking.order[:chosen] else "normal", color=COLOURS[0])
    bars.set(xlabel="block (bold, filled: replaced)", ylabel=SCORED.get(ranking.rank, ranking.rank))
    counts = range(1, len(ranking.path) + 1)
    path.plot(counts, [cost.agreement for cost in ranking.path], **STYLES[0])
    path.axvline(chosen, color="0.6", ls="--", lw=0.8, zorder=0)
    path.set_xticks(counts)
    path.set(xlabel="blocks replaced, cheapest first", ylabel="teacher's answers kept (%)")
    divergence = path.twinx()
    divergence.plot(counts, [cost.kl for cost in ranking.path], **STYLES[1])
    divergence.set_ylabel("KL to the teacher (nats)", color=COLOURS[1])
    path.yaxis.label.set_color(COLOURS[0])
    return figure


def kept_by_time(series: dict[str, list[tuple[float, float, float, str]]], rivals: dict[str, float]) -> Figure:
    """What models keep of their teacher against the time for one image: fast and faithful is left, up, and down for KL.

    series: by name, points (ms, agreement %, KL, text); those of a name are joined. rivals: ms of models that keep all.
    """
    labels = ("teacher's answers kept (%)", "KL to the teacher (nats)")
    figure, panels = empty_panels(9, 3.8, "one image (ms)", *labels)
    for column, axes in enumerate(panels, 1):
        for k, (name, points) in enumerate(series.items()):
            style = STYLES[k % 6] | {"markerfacecolor": "none" if k >= 6 else COLOURS[k]}
            axes.plot([p[0] for p in points], [p[column] for p in points], label=name, lw=0.8, ms=5, **style)
            for point in points:
                axes.annotate(point[3], (point[0], point[column]), (4, 4), textcoords="offset points", fontsize=7)
        for k, (name, ms) in enumerate(rivals.items()):
            axes.axvline(ms, color="0.4", ls=("--", ":", "-.")[k % 3], lw=1, label=name, zorder=0)
        axes.margins(0.1)
    logarithmic(panels[1].yaxis, [p[2] for points in series.values() for p in points])
    legend_above(figure, panels[0])
    return figure


def energy_bars(energy: dict[str, dict[str, Any]]) -> Figure:
    """Microjoules an image by model and component, (low, likely, high); whiskers span the cost of writing cells."""
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(energy)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(energy))
    for component, colour in zip(next(iter(energy.values())), COLOURS, strict=True):
        values = np.array([parts[component][1] for parts in energy.values()])
        axes.barh(range(len(energy)), values, left=left, color=colour, label=component, height=0.7)
        left += values
    for row, parts in enumerate(energy.values()):
        low, likely, high = parts["writing cells"]
        if high:
            span = [[likely - low], [high - likely]]
            axes.errorbar(left[row], row, xerr=span, color="black", capsize=3, lw=1)
    axes.set_yticks(range(len(energy)), energy)
    axes.invert_yaxis()
    axes.set(xlabel="energy an image (µJ)")
    legend_above(figure, axes)
    return figure
