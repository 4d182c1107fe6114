"""Figures of token maps: functions from arrays to a Matplotlib figure, colours safe for colour-blind readers."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.transforms import Transform

SIGNED, AMOUNT = "PuOr", "cividis"
ACROSS = 12  # panels in a line; more blocks go on in the next
MARGIN, COLOUR_BAR, TITLE, CAPTION, PANEL = 0.5, 0.9, 0.4, 1.0, 2.6  # inches


def signed(value: float, sign: str = "") -> str:
    """Two digits, with a minus as long as a digit. sign: "+" writes the plus, too."""
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")


@dataclass(frozen=True)
class Row:
    """A quantity block by block, on one scale.

    panels: by block (or by title, where a figure has one row), an array of two dimensions.
    signed: whether colours diverge from zero; else they are an amount from zero.
    unit: what the colour bar is of.
    rho: by block, the rank correlation with another row, for the panel's title.
    top: the scale's end; else 99 % of the values lie within it.
    """

    title: str
    panels: dict[int, np.ndarray] | dict[str, np.ndarray]
    signed: bool
    unit: str
    rho: dict[int, float] = field(default_factory=dict)
    top: float | None = None

    @property
    def colours(self) -> ScalarMappable:
        values = np.abs(np.concatenate([panel.ravel() for panel in self.panels.values()]))
        top = self.top or np.percentile(values, 99) or values.max() or 1.0
        return ScalarMappable(Normalize(-top if self.signed else 0, top), SIGNED if self.signed else AMOUNT)

    @property
    def lines(self) -> int:
        return -(-len(self.panels) // ACROSS)


Draw = Callable[[Axes, np.ndarray, ScalarMappable], None]


def importance_maps(image: np.ndarray, title: str, maps: dict[str, np.ndarray], caption: str, unit: str) -> Figure:
    """One image, and beside it one map a model, laid over it; 99 % of all maps' values lie within their one scale.

    Args:
        image: (S, S, 3), 0 to 1.
        maps: by the panel's title, a signed map (S, S).
        unit: what the colour bar is of.
    """
    width = max(8.0, PANEL * (1 + len(maps)) + COLOUR_BAR)
    figure = Figure(figsize=(width, CAPTION + PANEL), layout="constrained")
    head, body = figure.subfigures(2, 1, height_ratios=(CAPTION, PANEL))
    _write(head, head.transSubfigure, width, title, caption)
    panels = body.subplots(1, 1 + len(maps))
    for axes, name in zip(panels, ("image", *maps), strict=True):
        axes.set_axis_off()
        axes.set_title(name, fontsize=8, parse_math=False)
    panels[0].imshow(image)
    colours = Row(title, maps, True, unit).colours
    for axes, values in zip(panels[1:], maps.values(), strict=True):
        _overlay(axes, image, values, colours)
    _bar(colours, panels[-1], "both", unit)
    return figure


def block_maps(image: np.ndarray, title: str, rows: list[Row], caption: str) -> Figure:
    """Patch maps (rows, columns) laid over one image (S, S, 3): a row a quantity, a column a block."""

    def draw(axes: Axes, values: np.ndarray, colours: ScalarMappable) -> None:
        axes.set_axis_off()
        _overlay(axes, image, values, colours)

    figure, (head, *rest) = _page(rows, CAPTION, ticks=0)
    _write(head, head.transSubfigure, figure.get_figwidth(), title, caption)
    _fill(rest, rows, draw)
    return figure


def token_matrices(title: str, rows: list[Row], labels: tuple[str, str], caption: str) -> Figure:
    """Token-by-token matrices (R, N): a row a quantity, a column a block.

    A matrix of fewer than N rows shows that many of the N tokens, spread evenly. labels: of the horizontal and the
    vertical axis.
    """

    def draw(axes: Axes, values: np.ndarray, colours: ScalarMappable) -> None:
        edge = values.shape[1] - 0.5
        axes.imshow(values, norm=colours.norm, cmap=colours.cmap, extent=(-0.5, edge, edge, -0.5), aspect="equal")
        axes.tick_params(labelsize=6)

    figure, (head, *rest) = _page(rows, CAPTION, ticks=0.35)
    _write(head, head.transSubfigure, figure.get_figwidth(), title, caption)
    for sub in rest:
        sub.supxlabel(labels[0], fontsize=7)
        sub.supylabel(labels[1], fontsize=7)
    _fill(rest, rows, draw)
    return figure


def _page(rows: list[Row], first: float, ticks: float) -> tuple[Figure, list[SubFigure]]:
    """A figure of parts: one `first` inches high, and one a row, its panels as large as the width allows.

    ticks: inches below a line of panels.
    """
    across = min(ACROSS, len(rows[0].panels))
    panel = min(2.1, max(1.3, 15 / across))
    heights = [first, *((panel + 0.2 + ticks) * row.lines + TITLE for row in rows)]
    width = max(8.0, (panel + 0.08) * across + MARGIN + COLOUR_BAR)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    return figure, list(figure.subfigures(len(heights), 1, height_ratios=heights))


def _fill(parts: list[SubFigure], rows: list[Row], draw: Draw) -> None:
    """Each row's panels in its part, with its title and one colour bar."""
    for part, row in zip(parts, rows, strict=True):
        across = min(ACROSS, len(row.panels))
        grid = part.subplots(row.lines, across, squeeze=False, sharex=True, sharey=True)
        colours = row.colours
        for axes, (block, values) in zip(grid.flat, row.panels.items(), strict=False):
            draw(axes, values, colours)
            axes.set_anchor("W")
            note = f", ρ {signed(row.rho[block])}" if block in row.rho else ""
            axes.set_title(f"block {block}{note}", fontsize=7, pad=3)
        for axes in list(grid.flat)[len(row.panels) :]:
            axes.set_visible(False)
        part.suptitle(row.title, x=0.01, ha="left", fontsize=9, weight="bold", parse_math=False)
        clipped = "neither" if row.top else "both" if row.signed else "max"
        _bar(colours, grid[0, -1], clipped, row.unit)


def _bar(colours: ScalarMappable, beside: Axes, clipped: str, unit: str) -> None:
    """A colour bar as high as the panel beside it. clipped: the ends beyond which there are values."""
    bar = beside.figure.colorbar(colours, cax=beside.inset_axes((1.06, 0, 0.06, 1)), extend=clipped)
    bar.ax.tick_params(labelsize=6)
    bar.ax.yaxis.get_offset_text().set_size(6)
    bar.set_label(unit, fontsize=7)


def _write(part: Axes | SubFigure, coordinates: Transform, inches: float, title: str, caption: str) -> None:
    """A title and a caption at a part's upper left, in lines so wide."""
    lines = textwrap.fill(title, int(8 * inches)), textwrap.fill(caption, int(13 * inches))
    for height, text, style in zip(
        (0.98, 0.66), lines, ({"fontsize": 12, "weight": "bold"}, {"fontsize": 8.5}), strict=True
    ):
        part.text(0.01, height, text, va="top", transform=coordinates, parse_math=False, **style)


def _overlay(axes: Axes, image: np.ndarray, values: np.ndarray, colours: ScalarMappable) -> None:
    """A patch map over the grey image, the stronger the less of it shows through."""
    side = image.shape[0]
    whole = (0, side, side, 0)
    grey = 0.5 + 0.5 * image.mean(2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=whole)
    strength = np.clip(np.abs(values) / colours.norm.vmax, 0, 1)
    axes.imshow(colours.to_rgba(values), alpha=0.9 * strength, extent=whole, interpolation="nearest")
