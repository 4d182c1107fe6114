"""Labels are matched by name wherever a model that knows its classes meets data that knows its own."""

import json
import unicodedata
from dataclasses import replace

import pytest
import timm
import torch

import export
import main
import prune
import visualization
from datasets.classes import UnknownClass, imagenet_names, match_classes
from models import hub
from models.replace import FarConfig, build, load_model, pack
from tests.conftest import QUIET, write_images
from utils.checkpoint import save
from utils.preprocessing import Preprocessing

KNOWN = ("square", "circle", "bars")  # not in the order of a folder's names
ACCENTED = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("known", "names", "numbers"),
    [
        (KNOWN, KNOWN, [0, 1, 2]),
        (KNOWN, ("bars", "circle", "square"), [2, 1, 0]),
        (KNOWN, ("circle",), [1]),
        (("tea", "café"), (ACCENTED,), [1]),
        (imagenet_names(), ("n01443537", "n03126707"), [1, 517]),  # goldfish, the second of two cranes
        (imagenet_names(), imagenet_names(), list(range(1000))),
    ],
)
def test_names_find_their_numbers(known, names, numbers):
    assert match_classes(known, names) == numbers


@pytest.mark.parametrize(
    ("known", "names", "first"),
    [
        (KNOWN, ("bars", "dog", "cat"), "dog"),
        (("a", "a", "b"), ("b", "a"), "a"),
        (imagenet_names(), ("crane",), "crane"),
    ],
)
def test_the_first_name_without_a_number_of_its_own_is_named(known, names, first):
    with pytest.raises(UnknownClass, match=f"^{first}$"):
        match_classes(known, names)


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """Checkpoints far.pth and teacher.pth of models that know KNOWN and always answer circle."""
    root = tmp_path_factory.mktemp("circle")
    for name, replaced in (("far", (0, 1, 2, 3)), ("teacher", ())):
        config = FarConfig("DeiT-Micro", 3, 32, replaced=replaced, classes=KNOWN, preprocessing=Preprocessing())
        model = build(config)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
        save(root / f"{name}.pth", pack(model, config))
    return root


def folder(root, **counts):
    """Class folders of so many pictures, in both splits."""
    for split in ("train", "val"):
        for name, count in counts.items():
            write_images(root / split / name, count)
    return ["--dataset", "FOLDER", "--data-path", str(root)]


SMALL = ["--batch-size", "4", "--input-size", "32", *QUIET]
TRAINED = [*SMALL, "--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]


def accuracy(how, weights, data, out):
    """Top-1 of far.pth or teacher.pth on the data, by one of the scripts."""
    far, teacher = str(weights / "far.pth"), str(weights / "teacher.pth")
    run = ["--output-dir", str(out)]
    if how == "prune":
        flags = ["--model-path", far, "--epochs", "0", "--ft-epochs", "0", *SMALL]
        assert prune.main([*flags, *data, *run]) == 0
        return json.loads((out / "prune_report.json").read_text())["rows"][0]["acc1"]
    if how == "train":
        block = ["--block-ft-batch-size", "4", "--block-ft-epochs", "0", "--base-weight", teacher]
        main.main(["--mode", "train", *TRAINED, *block, *data, *run])
    elif how == "downstream":
        main.main(["--mode", "downstream", "--far-weight", far, *TRAINED, *data, *run])
    elif how == "teacher":
        main.main(["--mode", "teacher", "--base-weight", teacher, *TRAINED, *data, *run])
    else:
        weight = ["--far-weight", far] if how == "eval" else ["--base-weight", teacher]
        main.main(["--mode", "eval", *weight, "--num-workers", "0", *data, *run])
    return json.loads((out / "result.json").read_text())["acc1"]


@pytest.mark.parametrize("how", ["eval", "eval teacher", "prune", "train", "downstream", "teacher"])
def test_labels_are_the_models_numbers_by_name(how, circle, tmp_path):
    data = folder(tmp_path / "data", bars=1, circle=6, square=1)
    assert accuracy(how, circle, data, tmp_path / "run") == 75
    if "eval" not in how:
        assert load_model(tmp_path / "run/best.pth")[1].classes == KNOWN


@pytest.mark.parametrize("how", ["eval", "eval teacher", "prune", "train"])
def test_a_folder_of_some_of_the_classes_is_evaluated_on_those(how, circle, tmp_path, capsys):
    assert accuracy(how, circle, folder(tmp_path / "data", bars=1, circle=3), tmp_path / "run") == 75
    assert "has 2 of the 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["eval", "eval teacher", "prune", "train", "export"])
def test_a_class_that_the_model_does_not_know_is_named(script, circle, tmp_path, failure):
    data = folder(tmp_path / "data", bars=1, cat=1, dog=1)
    far, teacher = ["--far-weight", circle / "far.pth"], ["--base-weight", circle / "teacher.pth"]
    call, flags = {
        "eval": (main.main, ["--mode", "eval", *far]),
        "eval teacher": (main.main, ["--mode", "eval", *teacher]),
        "train": (main.main, [*teacher, *SMALL]),
        "prune": (prune.main, ["--model-path", circle / "far.pth", *SMALL]),
        "export": (export.main, ["--to", "safetensors", *far, "--output", tmp_path / "a.safetensors"]),
    }[script]
    assert "knows 3 classes, but not 'cat', one of the 3 that --dataset FOLDER has" in failure(
        *flags, *data, script=call
    )


@pytest.mark.parametrize("how", ["downstream", "teacher"])
@pytest.mark.parametrize(("more", "names"), [([], ("bird", "cat", "dog")), (["--nb-classes", "4"], None)])
def test_other_classes_get_a_fresh_classifier_and_their_own_names(how, more, names, circle, tmp_path, capsys):
    data = [*folder(tmp_path / "data", bird=1, cat=1, dog=2), *more]
    accuracy(how, circle, data, tmp_path / "run")
    model, config = load_model(tmp_path / "run/best.pth")
    assert config.classes == (names or ("bird", "cat", "dog", "class 3"))
    assert model.head.weight.abs().sum() > 0 and "does not know these classes" in capsys.readouterr().out


def test_export_counts_right_answers_by_name(circle, tmp_path, capsys):
    data = folder(tmp_path / "data", bars=1, circle=3)
    weight = ["--far-weight", str(circle / "far.pth"), "--output", str(tmp_path / "a.safetensors")]
    export.main(["--to", "safetensors", *weight, *data])
    assert "75.00" in capsys.readouterr().out


def test_visualization_says_which_class_the_models_do_not_know(circle, tmp_path, caplog):
    data = folder(tmp_path / "data", cat=1, circle=1)
    flags = ["--far-weight", str(circle / "far.pth"), "--count", "1", "--block", "0"]
    visualization.main([*flags, *data, "--output-dir", str(tmp_path / "figures")])
    assert "do not know its class 'cat'" in caplog.text


def test_the_hub_and_timm_know_the_names_until_the_classifier_is_another(circle, tmp_path):
    far = str(circle / "far.pth")
    assert hub.load(far).pretrained_cfg["label_names"] == KNOWN
    assert "label_names" not in hub.load(far, num_classes=2).pretrained_cfg
    config = replace(FarConfig("DeiT-Tiny", 3, 32, replaced=tuple(range(12))), classes=KNOWN)
    save(tmp_path / "tiny.pth", pack(build(config), config))
    export.main(
        [
            "--to",
            "safetensors",
            "--far-weight",
            str(tmp_path / "tiny.pth"),
            "--output",
            str(tmp_path / "model.safetensors"),
        ]
    )
    import models.timm_models  # noqa: F401  (registers them)

    assert tuple(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg["label_names"]) == KNOWN
    assert (
        "label_names" not in timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).pretrained_cfg
    )
