"""Labels are matched by name wherever a model that knows its classes meets data that knows its own."""

import unicodedata
from pathlib import Path

import pytest
import torch

import export
import main
import models.timm_models  # noqa: F401  (registers)
import prune
from datasets.classes import UnknownClass, imagenet_names, match_classes
from models import hub
from models.replace import FarConfig, build, load_model, pack
from plots.pictures import find_images, find_models
from tests.conftest import QUIET, report, write_images
from utils.checkpoint import save
from utils.configs import PictureConfig
from utils.preprocessing import Preprocessing

KNOWN = ("circle", "square", "bars")  # none has the number that it has among a folder's names
OTHER = ("bars", "square", "circle")
ACCENTED = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("known", "names", "numbers"),
    [
        (KNOWN, ("bars", "circle", "square"), [2, 0, 1]),
        (KNOWN, ("square",), [1]),
        (("tea", "café"), (ACCENTED,), [1]),
        (imagenet_names(), ("n01443537", "n03126707"), [1, 517]),  # goldfish, the second of two cranes
        (imagenet_names(), imagenet_names(), list(range(1000))),
    ],
)
def test_names_find_their_numbers(known, names, numbers):
    assert match_classes(known, names) == numbers


@pytest.mark.parametrize(
    ("known", "names", "first"), [(KNOWN, ("bars", "dog", "cat"), "dog"), (imagenet_names(), ("crane",), "crane")]
)
def test_the_first_name_without_a_number_of_its_own_is_named(known, names, first):
    with pytest.raises(UnknownClass, match=f"^{first}$"):
        match_classes(known, names)


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """Checkpoints far.pth and teacher.pth of models that know KNOWN and always answer circle."""
    root = tmp_path_factory.mktemp("circle")
    says_circle(root, "far", KNOWN)
    says_circle(root, "teacher", KNOWN, replaced=())
    return root


def folder(root, **counts):
    """Class folders with these counts of images, in both splits; returns the flags."""
    for split in ("train", "val"):
        for name, count in counts.items():
            write_images(root / split / name, count)
    return ["--dataset", "FOLDER", "--data-path", str(root)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The flags of class folders in which six of eight images are circles."""
    return folder(tmp_path_factory.mktemp("shapes"), bars=1, circle=6, square=1)


def says_circle(folder, name, classes, replaced=(0, 1, 2, 3)):
    """A checkpoint of a model with these classes that always answers circle."""
    config = FarConfig(
        "DeiT-Micro", len(classes), 32, replaced=replaced, classes=classes, preprocessing=Preprocessing()
    )
    model = build(config)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[classes.index("circle")] = 9
    save(folder / f"{name}.pth", pack(model, config))
    return str(folder / f"{name}.pth")


SMALL = ["--batch-size", "4", "--input-size", "32", *QUIET]
TRAINED = [*SMALL, "--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]


def door(how, weights):
    """A script and its flags, with far.pth or teacher.pth from this folder."""
    far, teacher = ["--far-weight", str(weights / "far.pth")], ["--base-weight", str(weights / "teacher.pth")]
    block = ["--block-ft-batch-size", "4", "--block-ft-epochs", "0"]
    return {
        "eval": (main.main, ["--mode", "eval", *far, "--num-workers", "0"]),
        "train": (main.main, ["--mode", "train", *teacher, *TRAINED, *block]),
        "downstream": (main.main, ["--mode", "downstream", *far, *TRAINED]),
        "teacher": (main.main, ["--mode", "teacher", *teacher, *TRAINED]),
        "prune": (prune.main, ["--model-path", far[1], "--epochs", "0", "--ft-epochs", "0", *SMALL]),
        "export": (export.main, ["--to", "safetensors", *far, "--output", str(weights / "a.safetensors")]),
    }[how]


def result(how, weights, data, out):
    """What a script writes down of its evaluation."""
    script, flags = door(how, weights)
    assert script([*flags, *data, "--output-dir", str(out)]) == 0
    if how == "prune":
        return report(out, "prune_report.json")["rows"][0]
    return report(out)


@pytest.mark.parametrize("how", ["eval", "prune", "train", "downstream", "teacher"])
def test_labels_are_the_models_numbers_by_name(how, circle, shapes, tmp_path):
    assert result(how, circle, shapes, tmp_path / "run")["acc1"] == 75
    if how != "eval":
        assert load_model(tmp_path / "run/best.pth")[1].classes == KNOWN


def test_a_folder_of_some_of_the_classes_is_evaluated_on_those(circle, tmp_path, capsys):
    data = folder(tmp_path / "data", bars=1, circle=3)
    assert result("eval", circle, data, tmp_path / "run")["acc1"] == 75
    assert "has 2 of the 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["eval", "prune", "train", "export"])
def test_a_class_that_the_model_does_not_know_is_named(how, circle, tmp_path, failure):
    script, flags = door(how, circle)
    line = failure(*flags, *folder(tmp_path / "data", bars=1, cat=1, dog=1), script=script)
    assert "knows 3 classes, but not 'cat', one of the 3 that --dataset FOLDER has" in line


@pytest.mark.parametrize(
    ("how", "more", "names"),
    [("downstream", [], ("bird", "cat", "dog")), ("teacher", ["--nb-classes", "4"], ("bird", "cat", "dog", "class 3"))],
)
def test_other_classes_get_a_fresh_classifier_and_their_own_names(how, more, names, circle, tmp_path, capsys):
    data = [*folder(tmp_path / "data", bird=1, cat=1, dog=2), *more]
    result(how, circle, data, tmp_path / "run")
    model, config = load_model(tmp_path / "run/best.pth")
    assert config.classes == names
    assert model.head.weight.abs().sum() > 0 and "a fresh classifier is trained" in capsys.readouterr().out


def test_a_model_and_its_teacher_are_compared_by_name(circle, shapes, tmp_path, failure):
    teacher = ["--base-weight", says_circle(tmp_path, "teacher", OTHER, replaced=())]
    answers = result("eval", circle, [*shapes, *teacher], tmp_path / "run")
    assert answers["agreement"] == 100 and answers["teacher_acc1"] == answers["acc1"] == 75
    stranger = ["--base-weight", says_circle(tmp_path, "stranger", ("circle", "cat", "square"), replaced=())]
    assert "does not know the class 'bars'" in failure(*door("eval", circle)[1], *shapes, *stranger)


def test_weights_after_the_attention_stage_answer_by_name(circle, shapes, tmp_path):
    attn = ["--attn-weight", says_circle(tmp_path, "attn", OTHER)]
    answers = result("train", circle, [*shapes, *attn], tmp_path / "run")
    assert answers["acc1"] == 75 and answers["agreement"] == 100


def test_pictures_of_two_models_name_classes_alike(circle, tmp_path):
    weights = {"base_weight": says_circle(tmp_path, "t", OTHER, replaced=()), "far_weight": circle / "far.pth"}
    loaded, config, _ = find_models(PictureConfig(**{k: Path(v) for k, v in weights.items()}, output_dir=tmp_path))
    answers = {config.classes[model(torch.zeros(1, 3, 32, 32)).argmax()] for model in loaded.values()}
    assert answers == {"circle"}


def test_export_counts_right_answers_by_name(circle, tmp_path, capsys):
    script, flags = door("export", circle)
    assert script([*flags, *folder(tmp_path / "data", bars=1, circle=3)]) == 0
    assert "75.00" in capsys.readouterr().out


def test_pictures_say_which_class_the_models_do_not_know(tmp_path, caplog):
    folder(tmp_path, cat=1, circle=1)
    args = PictureConfig(dataset="FOLDER", data_path=tmp_path, count=1)
    find_images(args, FarConfig("DeiT-Micro", 3, 32, classes=KNOWN))
    assert "do not know its class 'cat'" in caplog.text


def test_the_hub_knows_the_names_until_the_classifier_is_another(circle):
    far = circle / "far.pth"
    assert hub.load(far).pretrained_cfg["label_names"] == KNOWN
    assert "label_names" not in hub.load(far, num_classes=2).pretrained_cfg
