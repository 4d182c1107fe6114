"""Distillation that sees no label: of a labelled data set, and of a folder of pictures."""

import numpy as np
import pytest
import torch

import main
from datasets import registry
from datasets.loading import Data, preprocessing
from models.deit import create_teacher
from models.replace import load_model
from models.weights import load_teacher_weights, read
from tests.conftest import BATCH, BLOCK_BATCH, QUIET, TRAIN, assert_equal, digits, report, weights, write_images
from utils.configs import DataConfig
from utils.distributed import Context

PRESERVE = "--train-loss preserve --block-ft-train-loss preserve --epochs 1 --block-ft-epochs 1 --select last".split()
PICTURES = ["--dataset", "IMAGES", "--scale", "Micro", *QUIET]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures, some of them in a folder below."""
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder, 13, size=32)
    write_images(folder / "more/below", 11, size=32, seed=1)
    return folder


def test_a_run_on_preserve_never_sees_a_label(teacher, tmp_path, monkeypatch):
    argv = [*TRAIN, "--train-subset", "0.06", "--holdout", "0.02", "--base-weight", str(teacher), *PRESERVE]
    assert main.main([*argv, "--output-dir", str(tmp_path / "true")]) == 0
    init = registry.Digits.__init__

    def permuted(self, train):
        init(self, train)
        self.targets = np.random.default_rng().permutation(self.targets).tolist()

    monkeypatch.setattr(registry.Digits, "__init__", permuted)
    assert main.main([*argv, "--output-dir", str(tmp_path / "permuted")]) == 0
    assert_equal(weights(tmp_path / "true", "best.pth"), weights(tmp_path / "permuted", "best.pth"))


def test_a_folder_of_pictures_is_enough(pictures, teacher, tmp_path):
    argv = ["--mode", "train", *PICTURES, *BATCH, *BLOCK_BATCH, "--data-path", str(pictures), *PRESERVE]
    weight = ["--base-weight", str(teacher)]
    assert main.main([*argv, *weight, "--batch-size", "8", "--output-dir", str(tmp_path / "run")]) == 0
    result = report(tmp_path / "run")
    student, config = load_model(tmp_path / "run/best.pth", "--test")
    reference = create_teacher("DeiT-Micro", 10, 32).eval()
    load_teacher_weights(reference, read(teacher))
    files = sorted(pictures.rglob("*.jpg"))
    read_as = preprocessing(
        DataConfig("IMAGES", pictures, 32), registry.SOURCES["IMAGES"], config.expected_preprocessing
    )
    transform = read_as.transform(32)
    batch = torch.stack([transform(registry.read_image(file)) for file in files[::10]])
    with torch.no_grad():
        same = (student(batch).argmax(1) == reference(batch).argmax(1)).sum().item()
    assert config.classes == tuple("0123456789") and result["images"] == len(batch) == 3
    assert result["acc1"] == pytest.approx(100 * same / 3) == pytest.approx(result["agreement"])
    assert result["teacher_acc1"] == 100 and result["teacher_errors"] == 0
    assert len(Data(DataConfig("IMAGES", pictures, 32), Context()).train) == 21

    far = ["--far-weight", str(tmp_path / "run/best.pth"), "--images-only", "--data-path", str(pictures)]
    assert main.main(["--mode", "eval", *far, *weight, "--num-workers", "0", "--output-dir", str(tmp_path / "e")]) == 0
    assert report(tmp_path / "e")["agreement"] == result["agreement"]


def test_each_process_evaluates_by_its_own_answers():
    wanted = torch.randint(10, (360,)).tolist()
    for world in (1, 3):
        for rank in range(world):
            data = digits(rank, world)
            data.set_labels(wanted[rank::world], 10)
            assert [label for _, labels in data.val_loader(50) for label in labels.tolist()] == wanted[rank::world]
