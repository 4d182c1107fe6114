"""Folders as people have them: with what systems and tools leave there, with val/ alone, moved, named by a tilde."""

import shutil

import pytest

import main
from datasets.images import SUFFIXES, find_files
from datasets.loading import Data
from tests.conftest import QUIET, image_folder, write_images
from utils.configs import DataConfig
from utils.distributed import Context

LEFT = ["._0.jpg", ".hidden.png", "Thumbs.db", "notes.txt", "@eaDir/0.jpg", "__MACOSX/._0.jpg", "$RECYCLE.BIN/0.jpg"]


def litter(folder):
    for name in LEFT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")


@pytest.mark.parametrize("name", ["FOLDER", "IMAGES"])
def test_what_is_no_picture_is_skipped_and_counted_in_one_line(name, tmp_path, caplog):
    root = image_folder(tmp_path)
    clean = Data(DataConfig(name, root, 32), Context())
    for folder in (root / "train", root / "val/class1"):
        litter(folder)
    data = Data(DataConfig(name, root, 32), Context())
    assert len(data.train) == len(clean.train) and len(data.val) == len(clean.val) and data.names == clean.names
    (line,) = [record.message for record in caplog.records]
    count = 2 * len(LEFT) * (2 if name == "IMAGES" else 1)  # both splits of IMAGES read the same folder
    assert f"{count} in all" in line and str(root) in line


def test_images_of_one_folder_are_those_with_a_known_suffix(tmp_path):
    names = {f"b{suffix.upper()}" for suffix in SUFFIXES}
    for name in names:
        (tmp_path / name).touch()
    litter(tmp_path)
    assert {path.name for path in find_files(tmp_path)} == names


def test_what_evaluates_alone_needs_no_training_split(tmp_path):
    write_images(tmp_path / "val/cat", 3)
    data = Data(DataConfig("FOLDER", tmp_path, 32, num_workers=0), Context(), trains=False)
    assert data.train is None and len(data.val) == 3 and data.class_names == ("cat",)


TEACH = ["--mode", "teacher", "--scale", "Micro", "--input-size", "32", "--batch-size", "4", "--epochs", "1", *QUIET]


def test_a_run_goes_on_wherever_its_data_and_weights_lie_but_not_with_others(teacher, tmp_path, failure):
    data, run = image_folder(tmp_path / "data"), tmp_path / "run"
    weight, moved = shutil.copy(teacher, tmp_path / "weight.pth"), shutil.copy(teacher, tmp_path / "moved.pth")
    flags = [*TEACH, "--dataset", "FOLDER", "--output-dir", run, "--data-path"]
    assert main.main([str(word) for word in [*flags, data, "--base-weight", weight]]) == 0
    data = data.rename(tmp_path / "elsewhere")
    again = [*flags, data, "--resume", "--base-weight"]
    assert main.main([str(word) for word in [*again, moved]]) == 0
    shutil.copy(run / "best.pth", moved)
    line = failure(*again, moved)
    assert "does not hold what" in line and "--base-weight" in line
    write_images(data / "train/class0", 1, seed=7)  # another picture of the same name
    assert f"--data-path {data}: does not hold what" in failure(*again, weight)


def test_a_tilde_is_the_home_folder_in_any_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image_folder(tmp_path / "data")
    main.main([*TEACH, "--dataset", "FOLDER", "--data-path=~/data", "--output-dir", "~/run"])
    assert (tmp_path / "run/best.pth").exists()
