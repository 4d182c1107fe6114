"""Solar cells, intact or defective, in electroluminescence: the package elpv-dataset, or a folder like its data."""

from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from datasets.images import ImageFiles
from utils.errors import FarError

TYPES, STATES = ("mono", "poly"), ("intact", "defective")


class SolarCells(ImageFiles):
    """2,624 grey photographs of solar cells (300 x 300) of 44 modules, as RGB: 1,968 train, 656 evaluate.

    labels.csv names an image, the probability that its cell is defective (an expert's judgement: 0, 1/3, 2/3 or 1)
    and the type of its module, a line each. A probability above one half counts as defective. The split is fixed and
    stratified by probability and type.

    Deitsch et al. (Solar Energy 185, 2019, arXiv 1807.02894) train on 1,968 cells, too; their average accuracy is
    82.44 % for an SVM and 88.42 % for a CNN. Their split and their use of the expert's doubts may differ from ours.

    Args:
        root: the folder of labels.csv and images/.
        train: which split.
        types: four classes, of both types intact and defective; else two, intact and defective.

    Raises:
        FileNotFoundError: no labels.csv.
        FarError: a labels.csv of another form, or too small to be split.
    """

    def __init__(self, root: Path, train: bool, types: bool):
        names, probabilities, kinds = read_labels(root / "labels.csv")
        self.classes = [f"{kind} {state}" for kind in TYPES for state in STATES] if types else list(STATES)
        labels = (probabilities > 0.5) + types * len(STATES) * kinds
        strata = np.unique([probabilities, kinds], axis=1, return_inverse=True)[1]
        try:
            split = train_test_split(np.arange(len(names)), test_size=0.25, stratify=strata, random_state=0)
        except ValueError as error:
            raise FarError(f"--data-path {root}: too few images of a kind in labels.csv; complete it") from error
        chosen = np.sort(split[0 if train else 1])
        super().__init__(root, [root / names[i] for i in chosen], labels[chosen].tolist())


def read_labels(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Image names, probabilities and types (indices of TYPES) of a labels.csv. Raises FarError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        rows = np.loadtxt(path, dtype=[("name", "U256"), ("probability", "f8"), ("type", "U8")], ndmin=1)
        if not ((rows["probability"] >= 0) & (rows["probability"] <= 1)).all():
            raise ValueError("a probability outside 0 to 1")
        return rows["name"].tolist(), rows["probability"], np.array([TYPES.index(name) for name in rows["type"]])
    except ValueError as error:
        where = f"--data-path {path}: not a line each of image, probability and type"
        raise FarError(f"{where} ({error}); mend the line, or install the package again") from error
