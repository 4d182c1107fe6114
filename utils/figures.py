"""Figures: functions from plain data to a Matplotlib figure."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for colour-blind readers


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss, accuracy and rate over the epochs of all stages, in the order they ran."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    x = list(range(len(rows)))
    trained = [(i, row) for i, row in enumerate(rows) if row["train"]]
    loss.plot([i for i, _ in trained], [r["train"]["loss"] for _, r in trained], color=COLOURS[0], label="training loss")
    loss.plot(x, [r["val"]["loss"] for r in rows], color=COLOURS[1], ls="--", label="evaluation cross entropy")
    loss.set_yscale("log")
    accuracy.plot(x, [r["val"]["acc1"] for r in rows], color=COLOURS[0], label="top-1")
    accuracy.plot(x, [r["val"]["acc5"] for r in rows], color=COLOURS[1], ls="--", label="top-5")
    rate.plot([i for i, _ in trained], [r["lr"] for _, r in trained], color=COLOURS[0], label="rate at the epoch's end")
    for axis, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        axis.set(xlabel="epoch, over all stages", ylabel=label)
        for i, row in enumerate(rows):
            if row["epoch"] == 0:
                axis.axvline(i, color="0.8", lw=0.8, zorder=0)
                if axis is accuracy:
                    axis.annotate(row["stage"], (i, 0.5), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                                  fontsize=7, color="0.4", rotation=90)
        axis.legend(fontsize=7)
    return figure


def similarity_bars(similarity: dict[str, list[float]]) -> Figure:
    """Mean cosine similarity of z to the teacher's, by block; one group of bars per label (before, after)."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(similarity)
    for k, (label, values) in enumerate(similarity.items()):
        bars = axis.bar([i + (k - (len(similarity) - 1) / 2) * width for i in range(len(values))], values, width,
                        label=label, color=COLOURS[k])  # fmt: skip
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.set(xlabel="block", ylabel="cosine similarity of z", ylim=(min(0, *map(min, similarity.values())) - 0.1, 1.2))
    axis.set_xticks(range(len(values)))
    axis.axhline(0, color="0.5", lw=0.6)
    axis.legend(fontsize=8, ncols=2, loc="upper center")
    return figure
