"""Figures of token maps: functions from arrays to a Matplotlib figure, colours safe for colour-blind readers."""

import numpy as np
from matplotlib.figure import Figure

SIGNED, AMOUNT = "PuOr", "cividis"


def importance_maps(
    image: np.ndarray,
    maps: dict[str, dict[int, np.ndarray]],
    titles: dict[str, str],
    rho: dict[str, dict[int, float]],
    rollout: np.ndarray | None = None,
) -> Figure:
    """One image's token importance, a row a block, a column a model, overlaid on the image.

    Args:
        image: (S, S, 3), 0 to 1.
        maps: model name to block to patch map (rows, columns); signed.
        titles: model name to column title.
        rho: model name to block to rank correlation with the first model's map.
        rollout: the teacher's attention rollout over patches, shown under the image.
    """
    names, blocks = list(maps), list(next(iter(maps.values())))
    rows = max(len(blocks), 2 if rollout is not None else 1)
    figure = Figure(figsize=(2.1 * (len(names) + 1) + 0.8, 2.2 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(names) + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("image", fontsize=9)
    if rollout is not None:
        _overlay(axes[1, 0], image, rollout, (AMOUNT, 0, rollout.max()), "attention rollout")
    for k, name in enumerate(names, start=1):
        for row, block in enumerate(blocks):
            head = f"{titles[name]}\n" if row == 0 else ""
            against = f", ρ {rho[name][block]:.2f}" if name in rho else ""
            values = maps[name][block]
            top = np.abs(values).max() or 1.0
            _overlay(axes[row, k], image, values, (SIGNED, -top, top), f"{head}block {block}{against}")
    return figure


def _overlay(axis, image: np.ndarray, values: np.ndarray, colours: tuple[str, float, float], title: str) -> None:
    """A patch map over the grey image; `colours` are a map and the values at its ends."""
    side, (name, low, high) = image.shape[0], colours
    whole = (0, side, side, 0)
    axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=1, extent=whole)
    shown = axis.imshow(values, cmap=name, vmin=low, vmax=high, alpha=0.65, extent=whole, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.7).ax
    bar.tick_params(labelsize=6)
    bar.yaxis.get_offset_text().set_size(6)


def matrix_rows(
    columns: dict[str, dict[int, np.ndarray]],
    signed: dict[str, bool],
    note: dict[str, dict[int, str]],
    axis_labels: tuple[str, str],
    share_scale: bool,
) -> Figure:
    """Token-by-token matrices (N, N): a row a block, a column a quantity.

    Args:
        signed: by column, whether it is centred at zero (diverging colours from -m to m) or an amount from 0.
        note: by column and block, what is added to the panel's title.
        axis_labels: of the horizontal and the vertical token axis.
        share_scale: signed columns run from -1 to 1 (cosines and their differences); else each panel has its own scale.
    """
    names, blocks = list(columns), list(next(iter(columns.values())))
    figure = Figure(figsize=(2.7 * len(names) + 0.4, 2.4 * len(blocks) + 0.3), layout="constrained")
    axes = figure.subplots(len(blocks), len(names), squeeze=False)
    for row, block in enumerate(blocks):
        for k, name in enumerate(names):
            axis, values = axes[row, k], columns[name][block]
            top = 1.0 if share_scale else np.abs(values).max() or 1.0
            shown = axis.imshow(
                values, cmap=SIGNED if signed[name] else AMOUNT, vmin=-top if signed[name] else 0, vmax=top
            )
            extra = note.get(name, {}).get(block, "")
            axis.set_title(f"{name}, block {block}{extra}", fontsize=8)
            axis.tick_params(labelsize=6)
            if row == len(blocks) - 1:
                axis.set_xlabel(axis_labels[0], fontsize=8)
            if k == 0:
                axis.set_ylabel(axis_labels[1], fontsize=8)
            figure.colorbar(shown, ax=axis, shrink=0.8).ax.tick_params(labelsize=6)
    return figure
