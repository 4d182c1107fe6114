"""Draws README's first figure: attention swapped for LSTMs, and what trains when.

python3 docs/draw_swap.py [FILE]     default: docs/swap.png
"""

import io
import sys
from pathlib import Path
from random import Random

from matplotlib import path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

WIDTH, HEIGHT = 850, 732  # README's column on GitHub: lengths here are its pixels, the file has twice as many
INK, BLUE, ORANGE, GREY = "#212529", "#0072B2", "#C24E00", "#6C757D"
FILLS = {BLUE: "#CFE6F5", ORANGE: "#FBDDCB", GREY: "#E9ECEF", INK: "white"}  # by a box's edge
LEFT, RIGHT, INNER = 38, 496, 316  # where the two blocks stand; their width
HEADS = {"head 1": 0, "head 2": 104, "head H": 220}  # x in a block
LINKS = (  # between the blocks: y, reach into each, text, colour; grey copies weights, the others compare
    (170, 0, "starts as v", GREY),
    (358, 0, "stage attn", BLUE),
    (400, 0, "starts as proj", GREY),
    (604, 98, "stage block", ORANGE),
)
PARTS = {"norm": 52, "pre_proj": 76, "LSTMs": 64, "head_proj": 88, "post_proj": 88, "norm ": 52, "MLP": 52}  # widths
STAGES = (  # y, name, colour, which of PARTS it trains, what it matches
    (660, "stage attn", BLUE, ("pre_proj", "LSTMs", "head_proj"), "z and answers"),
    (694, "stage block", ORANGE, tuple(PARTS), "block output and answers"),
)


def write(axes: Axes, x: float, y: float, text: str, size: float = 14.5, **style) -> None:
    axes.text(x, y, text, **{"fontsize": 0.72 * size, "ha": "center", "va": "center_baseline", "color": INK, **style})


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str = "", edge: str = GREY, **style) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=5", "fc": FILLS[edge], "ec": edge, "lw": 1.1, **style}
    axes.add_patch(FancyBboxPatch((x, y), w, h, **style))
    write(axes, x + w / 2, y + h / 2, text)


def arrow(axes: Axes, *points: tuple[float, float], color: str = INK, **style) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "lw": 1.1, "joinstyle": "miter", "color": color, **style}
    axes.add_patch(FancyArrowPatch(path=path.Path(points), **style))


def block(axes: Axes, x: float, side: int, title: str, module: str, first: str, last: str, color: str) -> None:
    """A transformer block from top to bottom, without its heads; residuals run left (side -1) or right (1) of it."""
    middle, outer = x + INNER / 2, x + INNER / 2 + side * 184
    box(axes, x - 10, 126, INNER + 20, 302, edge=color, fc="white", lw=1.6)
    rows = {84: ("norm", GREY), 156: (first, color), 344: ("z", INK), 386: (last, GREY)}
    for y, (text, edge) in (rows | {478: ("norm", GREY), 520: ("MLP", GREY)}).items():
        box(axes, x, y, INNER, 28, text, edge)
    write(axes, middle, 24, title, 17, weight="bold")
    write(axes, middle, 51, "N tokens of width D")
    write(axes, middle, 141, module, 15.5, weight="bold", color=color)
    write(axes, x + 210, 260, "…")
    write(axes, middle, 604, "block output")
    arrows = [(x + head + 48, y, y + 14) for head in HEADS.values() for y in (184, 330)]
    spans = (60, 84), (112, 126), (372, 386), (414, 444), (460, 478), (506, 520), (548, 562), (578, 594)
    for at, begin, end in [*arrows, *((middle, *span) for span in spans)]:
        arrow(axes, (at, begin), (at, end))
    for begin, end in ((71, 452), (468, 570)):
        arrow(axes, (middle, begin), (outer, begin), (outer, end), (middle + side * 8, end))
        axes.plot(middle, end, "o", ms=11.5, mfc="white", mec=INK, mew=1.1)
        axes.plot(middle, end, "+", ms=6.5, mec=INK, mew=1.1)


def heads(axes: Axes) -> None:
    """In attention every token reads every token; of two LSTMs one reads them forward, one backward."""
    for name, x in HEADS.items():
        a, b, random = LEFT + x, RIGHT + x, Random(name)
        box(axes, a, 198, 96, 132)
        box(axes, b, 198, 96, 132, edge=BLUE, fc="#EAF4FB", lw=0)
        weights = [[random.random() ** 2 for _ in range(7)] for _ in range(7)]
        columns, rows = [a + 13 + 10 * k for k in range(8)], [225 + 10 * k for k in range(8)]
        axes.pcolormesh(columns, rows, weights, cmap="Greys", ec="white", lw=0.8)
        for at, y, text in ((a, 212, name), (a, 314, "N × N"), (b, 212, name)):
            write(axes, at + 48, y, text)
        for at, begin, end in ((b + 4, 5, 38), (b + 50, 37, 4)):
            box(axes, at, 226, 42, 50, edge=BLUE)
            write(axes, at + 21, 239, "LSTM", 13)
            axes.plot([at + 7 + 7 * k for k in range(5)], [256] * 5, ".", color=BLUE, ms=4)
            arrow(axes, (at + begin, 266), (at + end, 266), color=BLUE)
            arrow(axes, (at + 21, 276), (at + 21, 292))
        box(axes, b + 4, 292, 88, 28, "head_proj", BLUE)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0), autoscale_on=False)
    axes.axis("off")
    block(axes, LEFT, -1, "DeiT block (teacher)", "attention", "q, k, v", "proj", GREY)
    block(axes, RIGHT, 1, "FAR block (student)", "multi-head bidirectional LSTM", "pre_proj", "post_proj", BLUE)
    heads(axes)
    axes.fill([372, 450, 450, 478, 450, 450, 372], [250, 250, 240, 264, 288, 278, 278], color=BLUE, lw=0)
    write(axes, 418, 264, "swap", 17, weight="bold", color="white")
    for y, reach, text, color in LINKS:
        style = {} if color == GREY else {"arrowstyle": "<|-|>", "ls": "--"}
        arrow(axes, (LEFT + INNER - reach, y), (RIGHT + reach, y), color=color, **style)
        write(axes, 425, y - 11, text, color=color)
    write(axes, 12, 644, "Trains", weight="bold", ha="left")
    write(axes, 116, 644, "grey: the teacher's weights, frozen  ·  loss: preserve", color=GREY, ha="left")
    write(axes, 624, 644, "Matches the teacher's", weight="bold", ha="left")
    for y, name, color, trained, matched in STAGES:
        write(axes, 12, y + 14, name, color=color, ha="left", weight="bold")
        write(axes, 624, y + 14, matched, color=color, ha="left")
        x = 116
        for part, width in PARTS.items():
            box(axes, x, y, width, 28, part.strip(), color if part in trained else GREY)
            x += width + 4
    return figure


if __name__ == "__main__":
    draw().savefig(png := io.BytesIO(), format="png")
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("swap.png")
    Image.open(png).convert("RGB").quantize(128).save(target, format="PNG", optimize=True)  # a third of the bytes
