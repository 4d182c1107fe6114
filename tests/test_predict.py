"""Class names and preprocessing travel with the weights; --mode predict names what a checkpoint sees."""

import csv
import json
import re

import pytest
import torch
from timm.data import ImageNetInfo

import main
from datasets.registry import Digits, class_names
from deploy.predict import Answer, as_text
from models.replace import load_model
from tests.conftest import BATCH, QUIET, digits, image_folder, write_images
from utils.checkpoint import load, save


@pytest.fixture
def pictures(tmp_path):
    """Seven digits of the evaluation split as files, 8 x 8 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        Digits(False)[i][0].save(folder / f"{i}.png")
    write_images(tmp_path / "other", 1)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize(("fuse", "workers"), [([], "0"), (["--fuse", "float32"], "2")])
def test_predict_gives_the_models_own_probabilities(pictures, far, tmp_path, fuse, workers):
    out = tmp_path / "answers.csv"
    flags = ["--images", str(pictures), "--output", str(out), "--batch-size", "3", "--num-workers", workers]
    assert main.main(["--mode", "predict", "--far-weight", str(far / "best.pth"), *flags, *fuse]) == 0
    data = digits()
    model, config = load_model(far / "best.pth")
    with torch.no_grad():
        expected = model(torch.stack([data.val[i][0] for i in range(7)])).softmax(1)
    with out.open() as file:
        found = list(csv.DictReader(file))
    assert [row["file"] for row in found[::5]] == [str(pictures / f"{i}.png") for i in range(7)] and len(found) == 35
    for i in range(7):
        order = expected[i].argsort(descending=True)[:5].tolist()
        mine = found[5 * i : 5 * i + 5]
        assert [int(row["index"]) for row in mine] == order and [int(row["rank"]) for row in mine] == [1, 2, 3, 4, 5]
        assert [row["name"] for row in mine] == [str(digit) for digit in order]
        for row in mine:
            assert abs(float(row["probability"]) - expected[i, int(row["index"])].item()) < 1e-4
    assert config.classes == tuple("0123456789") and config.preprocessing == data.preprocessing


def test_predict_prints_names_and_shares_of_a_teacher_too(pictures, teacher, capsys):
    assert main.main(["--mode", "predict", "--far-weight", str(teacher), "--images", str(pictures / "1.png")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    shares = [float(re.fullmatch(r" +([0-9.]+) %  [0-9]", line)[1]) for line in lines]
    assert first == str(pictures / "1.png") and len(shares) == 5 and shares == sorted(shares, reverse=True)


def test_names_cannot_move_the_terminal_nor_stop_the_print():
    odd = [Answer("a\udcff\n.png", 1, 0, "ü \x1b[2J", 0.5), Answer("a\udcff\n.png", 2, 1, "b\rc", 0.25)]
    assert as_text(odd) == "a\\udcff\\n.png\n   50.00 %  ü \\x1b[2J\n   25.00 %  b\\rc"


def test_a_folders_classes_are_named_and_go_with_the_weights_downstream(far, tmp_path):
    root = image_folder(tmp_path / "shapes", classes=3)
    command = ["--mode", "downstream", "--far-weight", str(far / "best.pth"), "--dataset", "FOLDER", *QUIET, *BATCH]
    out = tmp_path / "run"
    assert main.main([*command, "--data-path", str(root), "--epochs", "1", "--output-dir", str(out)]) == 0
    config = load(out / "best.pth")["config"]
    assert config["classes"] == ("class0", "class1", "class2")
    assert config["preprocessing"] == load(far / "best.pth")["config"]["preprocessing"]  # the model's, not the folder's
    answers = tmp_path / "answers.json"
    flags = ["--images", str(root / "val" / "class2"), "--output", str(answers), "--top", "9"]
    assert main.main(["--mode", "predict", "--far-weight", str(out / "best.pth"), *flags]) == 0
    found = json.loads(answers.read_text())
    assert len(found) == 4 * 3 and {row["name"] for row in found} == {"class0", "class1", "class2"}


def test_imagenets_classes_are_named_in_words():
    class Split:
        classes = ImageNetInfo().label_names()

    names = class_names("IMNET", Split())
    assert names[0].startswith("tench") and names[999].startswith("toilet tissue") and len(names) == 1000


def test_an_older_checkpoint_has_numbered_classes_and_a_word_about_it(far, pictures, tmp_path, capsys, caplog):
    content = load(far / "best.pth")
    del content["config"]["classes"], content["config"]["preprocessing"]
    save(tmp_path / "old.pth", content)
    assert main.main(["--mode", "predict", "--far-weight", str(tmp_path / "old.pth"), "--images", str(pictures)]) == 0
    assert re.search("class [0-9]$", capsys.readouterr().out.strip()) and "ImageNet" in caplog.text
