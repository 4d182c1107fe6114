"""Draws README's second figure: which tokens three blocks make alike, in the teacher, in FAR and pruned.

python3 docs/draw_real.py FIGURES [FILE]     what visualization.py left in a folder; default: docs/real.png

The committed one is of one photograph (visualization.py --images); of several it shows the mean.
"""

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

BLOCKS = (2, 5, 8)
MODELS = {"teacher": "attention", "FAR": "FAR", "pruned FAR": "FAR, pruned"}


def draw(figures: Path) -> Figure:
    alike = np.load(figures / "similarity-of-tokens.npz")
    figure = Figure(figsize=(11.5, 1.72), layout="constrained", facecolor="white")
    for block, column in zip(BLOCKS, figure.subfigures(1, len(BLOCKS), wspace=0.04), strict=True):
        column.suptitle(f"block {block}", fontsize=11, fontweight="bold")
        for axes, (key, name) in zip(column.subplots(1, len(MODELS)), MODELS.items(), strict=True):
            axes.imshow(alike[f"{key} block {block}"], cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(name, fontsize=9)
            axes.set_xticks([]), axes.set_yticks([])
    return figure


if __name__ == "__main__":
    where, file = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "real.png"
    picture = io.BytesIO()
    draw(where).savefig(picture, dpi=148)
    Image.open(picture).convert("RGB").quantize(96).save(file)  # a quarter of the size
