"""Figures: functions from plain data to a Matplotlib figure."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.checkpoint import write_atomic

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
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150, bbox_inches="tight"))


def training_curves(rows: list[dict[str, Any]]) -> Figure:
    """Loss, accuracy and rate over the epochs of all stages, in the order they ran."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    trained = [(i, row) for i, row in enumerate(rows) if row["train"]]
    loss.plot(
        [i for i, _ in trained], [r["train"]["loss"] for _, r in trained], color=COLOURS[0], label="training loss"
    )
    seen = [(i, row) for i, row in enumerate(rows) if row["val"]]
    x = [i for i, _ in seen]
    loss.plot(x, [r["val"]["loss"] for _, r in seen], color=COLOURS[1], ls="--", label="evaluation cross entropy")
    loss.set_yscale("log")
    accuracy.plot(x, [r["val"]["acc1"] for _, r in seen], color=COLOURS[0], label="top-1")
    accuracy.plot(x, [r["val"]["acc5"] for _, r in seen], color=COLOURS[1], ls="--", label="top-5")
    rate.plot([i for i, _ in trained], [r["lr"] for _, r in trained], color=COLOURS[0], label="rate at the epoch's end")
    for axis, label in ((loss, "loss"), (accuracy, "accuracy (%)"), (rate, "learning rate")):
        axis.set(xlabel="epoch, over all stages", ylabel=label)
        for i, row in enumerate(rows):
            if row["epoch"] == 0:
                axis.axvline(i, color="0.8", lw=0.8, zorder=0)
                if axis is accuracy:
                    axis.annotate(
                        row["stage"],
                        (i, 0.5),
                        xycoords=("data", "axes fraction"),
                        xytext=(3, 0),
                        textcoords="offset points",
                        fontsize=7,
                        color="0.4",
                        rotation=90,
                    )
        axis.legend(fontsize=7)
    return figure


def fidelity_by_block(reports: dict[str, dict[str, Any]]) -> Figure:
    """How far a student's blocks are from its teacher's, a group of bars per label (before, after, pruned)."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    width = 0.8 / len(reports)
    for axis, key, label in zip(
        figure.subplots(1, 2),
        ("z_similarity", "output_error"),
        ("cosine similarity of z", "relative error of outputs"),
        strict=True,
    ):
        for k, (name, report) in enumerate(reports.items()):
            values = list(report[key].values())
            places = [i + (k - (len(reports) - 1) / 2) * width for i in range(len(values))]
            bars = axis.bar(places, values, width, label=name, color=COLOURS[k])
            axis.bar_label(bars, fmt="%.2f", fontsize=5, padding=1)
        axis.set(xlabel="block", ylabel=label)
        axis.set_xticks(range(len(values)), report[key])
        axis.axhline(0, color="0.5", lw=0.6)
        axis.margins(y=0.1)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, ncols=len(reports), loc="outside upper center")
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
    axis.set_xticks(range(table.shape[1]), [f"{k // 2}{'fb'[k % 2]}" for k in range(table.shape[1])], fontsize=7)
    axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
    axis.set(xlabel="head, forward or backward", ylabel="block")
    figure.colorbar(image, label=f"kept units of {full}")
    return figure


def sweep_curve(points: list[dict], unpruned: dict, teacher: dict | None) -> Figure:
    """Top-1 against parameters at each keep ratio, with the unpruned FAR and the teacher marked."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    points = sorted(points, key=lambda p: p["parameters"])
    axis.plot(
        [p["parameters"] / 1e6 for p in points],
        [p["acc1"] for p in points],
        color=COLOURS[0],
        marker="o",
        label="pruned FAR",
    )
    for p in points:
        axis.annotate(
            f"{p['keep_ratio']:g}",
            (p["parameters"] / 1e6, p["acc1"]),
            xytext=(6, -10),
            textcoords="offset points",
            fontsize=7,
            ha="left",
        )
    for label, row, marker, colour in (
        ("unpruned FAR", unpruned, "s", COLOURS[1]),
        ("teacher (attention)", teacher, "D", COLOURS[2]),
    ):
        if row:
            axis.plot(row["parameters"] / 1e6, row["acc1"], ls="", marker=marker, color=colour, label=label)
    axis.margins(y=0.15)
    axis.set(xlabel="parameters (millions); labels are keep ratios", ylabel="top-1 (%)")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def latency_by_tokens(curve: dict[str, list[dict]]) -> Figure:
    """Time and extra memory of one layer against the number of tokens, both axes logarithmic."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, key, scale, label in zip(
        figure.subplots(1, 2),
        ("median_ms", "peak_bytes"),
        (1, 1e6),
        ("time a layer (ms)", "peak extra memory (MB)"),
        strict=True,
    ):
        for k, (name, points) in enumerate(curve.items()):
            axis.plot(
                [p["tokens"] for p in points],
                [p[key] / scale for p in points],
                marker="osD^"[k % 4],
                color=COLOURS[k],
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(tokens := [p["tokens"] for p in points], [f"{n:,}" for n in tokens], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=8)
    return figure


def accuracy_by_latency(rows: list[dict]) -> Figure:
    """Top-1 against the time for one image; FAR and its pruned sizes are joined by a line."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = figure.subplots()
    sizes = [row for row in rows if row["name"].startswith("FAR fused") and "bfloat16" not in row["name"]]
    axis.plot(
        [r["median_ms"] for r in sizes],
        [r["acc1"] for r in sizes],
        color=COLOURS[0],
        marker="o",
        label="FAR fused, by keep ratio",
    )
    for row in sizes:
        keep = row["name"].partition("keep ")[2] or "1"
        axis.annotate(keep, (row["median_ms"], row["acc1"]), xytext=(5, 5), textcoords="offset points", fontsize=7)
    for k, row in enumerate(r for r in rows if r not in sizes):
        axis.plot(row["median_ms"], row["acc1"], ls="", marker="sD"[k % 2], color=COLOURS[1 + k], label=row["name"])
    axis.margins(0.1)
    axis.set(xlabel="one image (ms)", ylabel="top-1 (%)")
    axis.legend(fontsize=8, loc="lower right")
    return figure
