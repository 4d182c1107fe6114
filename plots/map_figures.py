"""Figures of token maps: functions from arrays to a Matplotlib figure, colours safe for colour-blind readers."""

import textwrap
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

ACROSS = 12  # panels in a line; more blocks continue in the next
MARGIN, COLOUR_BAR, TITLE, CAPTION, TICKS = 0.5, 0.9, 0.4, 1.0, 0.35  # inches


def signed(value: float, sign: str = "") -> str:
    """Two digits, with a minus as long as a digit. sign: "+" writes the plus, too."""
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")


def colour_scale(panels: list[np.ndarray], diverging: bool, top: float | None = None) -> ScalarMappable:
    """One scale for all panels: purple to orange around zero, or blue to yellow from zero.

    top: the scale's end; by default 99 % of the values lie within it.
    """
    values = np.abs(np.concatenate([panel.ravel() for panel in panels]))
    top = top or np.percentile(values, 99) or values.max() or 1.0
    return ScalarMappable(Normalize(-top if diverging else 0, top), "PuOr" if diverging else "cividis")


def colour_bar(scale: ScalarMappable, beside: Axes, clipped: str, unit: str) -> None:
    """As high as the panel beside it. clipped: the ends beyond which there are values."""
    bar = beside.figure.colorbar(scale, cax=beside.inset_axes((1.06, 0, 0.06, 1)), extend=clipped)
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_size(6)
    bar.set_label(unit, fontsize=7)


def write_head(part: SubFigure, inches: float, title: str, caption: str) -> None:
    """A title and a caption in the upper left of a part `inches` wide."""
    part.text(0.01, 0.98, textwrap.fill(title, int(8 * inches)), va="top", fontsize=12, weight="bold", parse_math=False)
    part.text(0.01, 0.66, textwrap.fill(caption, int(13 * inches)), va="top", fontsize=8.5, parse_math=False)


def importance_maps(image: np.ndarray, title: str, maps: dict[str, np.ndarray], caption: str, unit: str) -> Figure:
    """One image, and beside it one map a model, laid over it; 99 % of all maps' values lie within their one scale.

    Args:
        image: (S, S, 3), 0 to 1.
        maps: by the panel's title, a signed map (S, S).
        unit: what the colour bar is of.
    """
    panel = 2.6  # inches
    width = max(8.0, panel * (1 + len(maps)) + COLOUR_BAR)
    figure = Figure(figsize=(width, CAPTION + panel), layout="constrained")
    head, body = figure.subfigures(2, 1, height_ratios=(CAPTION, panel))
    write_head(head, width, title, caption)
    first, *panels = body.subplots(1, 1 + len(maps))
    for axes, name in zip((first, *panels), ("image", *maps), strict=True):
        axes.set_axis_off()
        axes.set_title(name, fontsize=8, parse_math=False)
    first.imshow(image)
    scale, extent = colour_scale(list(maps.values()), diverging=True), (0, image.shape[0], image.shape[0], 0)
    for axes, values in zip(panels, maps.values(), strict=True):  # over the pale grey image
        axes.imshow(0.5 + 0.5 * image.mean(2), cmap="gray", vmin=0, vmax=1, extent=extent)
        strength = np.clip(np.abs(values) / scale.norm.vmax, 0, 1)
        axes.imshow(scale.to_rgba(values), alpha=0.9 * strength, extent=extent, interpolation="nearest")
    colour_bar(scale, panels[-1], "both", unit)
    return figure


@dataclass(frozen=True)
class Row:
    """A quantity block by block, on one scale.

    panels: by block, a matrix (R, N). diverging: whether colours diverge from zero. unit: what the colour bar is of.
    top: the scale's end; else 99 % of the values lie within it. rho: by block, the rank correlation with the first row.
    """

    title: str
    panels: dict[int, np.ndarray]
    diverging: bool
    unit: str
    top: float | None = None
    rho: dict[int, float] = field(default_factory=dict)


def token_matrices(title: str, rows: list[Row], labels: tuple[str, str], caption: str) -> Figure:
    """Token-by-token matrices (R, N): a row a quantity, a column a block.

    A matrix of fewer than N rows shows that many of the N tokens, spread evenly. labels: of the horizontal and the
    vertical axis.
    """
    across, lines = min(ACROSS, len(rows[0].panels)), -(-len(rows[0].panels) // ACROSS)
    panel = min(2.1, max(1.3, 15 / across))  # inches
    heights = [CAPTION, *[(panel + 0.2 + TICKS) * lines + TITLE] * len(rows)]
    width = max(8.0, (panel + 0.08) * across + MARGIN + COLOUR_BAR)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    head, *parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    write_head(head, width, title, caption)
    for part, row in zip(parts, rows, strict=True):
        part.suptitle(row.title, x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        part.supxlabel(labels[0], fontsize=7)
        part.supylabel(labels[1], fontsize=7)
        grid = part.subplots(lines, across, squeeze=False, sharex=True, sharey=True)
        scale = colour_scale(list(row.panels.values()), row.diverging, row.top)
        for axes, (block, values) in zip(grid.flat, row.panels.items(), strict=False):
            edge = values.shape[1] - 0.5
            axes.imshow(values, norm=scale.norm, cmap=scale.cmap, extent=(-0.5, edge, edge, -0.5), aspect="equal")
            axes.tick_params(labelsize=6)
            axes.set_anchor("W")
            note = f", ρ {signed(row.rho[block])}" if block in row.rho else ""
            axes.set_title(f"block {block}{note}", fontsize=7, pad=3)
        for axes in list(grid.flat)[len(row.panels) :]:
            axes.set_visible(False)
        colour_bar(scale, grid[0, -1], "neither" if row.top else "both" if row.diverging else "max", row.unit)
    return figure
