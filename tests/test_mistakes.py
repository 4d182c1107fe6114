"""A mistake on a command line is one line that names it, and nothing is written: a table for every script."""

import importlib

import pytest
import torch

from models.deit import create_teacher
from models.replace import FarConfig, build, pack
from tests.conftest import DIGITS, EVAL, QUIET, TRAIN, image_folder, write_images
from tests.test_prune import SMALL
from tests.test_streams import write_tars
from tests.test_unlabelled import PRESERVE
from utils.checkpoint import save


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of files that command lines name, right and wrong ones."""
    root = tmp_path_factory.mktemp("world")
    image_folder(root / "good", count=1)
    for image in (image_folder(root / "empty", count=1) / "train/class1").iterdir():
        image.unlink()
    write_images(root / "pictures", 12)
    (root / "broken").mkdir()
    (root / "broken/broken.png").write_bytes(b"no image")
    write_tars(root / "tars")
    (write_tars(root / "lost") / "digits-validation-0001.tar").unlink()
    torch.save(create_teacher("DeiT-Tiny", 10, 32).state_dict(), root / "tiny.pth")
    for rep_by in ("gru", "mixer"):
        config = FarConfig("DeiT-Micro", 10, 32, rep_by, replaced=(1,))
        save(root / f"{rep_by}.pth", pack(build(config), config))
    return root


RUN = f"main.py {' '.join(TRAIN)}"
ON_FOLDER = f"main.py --mode teacher --dataset FOLDER --scale Micro {' '.join(QUIET)}"
PICTURES = f"--dataset IMAGES --data-path pictures --scale Micro {' '.join(QUIET)}"
UNLABELLED = f"main.py --mode train --base-weight TEACHER {PICTURES}"
EXPORT = "export.py --far-weight FAR"

MISTAKES = {  # by what a line begins with: how it goes on, and what is said
    f"{RUN} --base-weight TEACHER": {
        "--dataset NOPE": "--dataset: .*NOPE",
        "--base-model DeiT-Tiny": "--scale Micro",
        "--replace 0-4": "--replace 0-4",
        "--replace auto": "give either a number of blocks",
        "--replace auto:5": "--replace auto:5: this model has 4 blocks",
        "--replace 0-2 --rank alone": "--rank, --min-agreement: choose blocks for --replace auto",
        "--replace auto:2 --train-loss kl": "--train-loss kl: compares no block",
        "--replace auto:2 --skip-train-attn": "ranks trained replacements",
        "--replace auto:2 --dataset wds/x --holdout 0 --train-subset 1": "--replace auto: not with --dataset wds/x",
        "--base-weight missing.pth": "--base-weight missing.pth: no such file",
        "--base-weight tiny.pth": "another architecture|has shape",
        "--block-ft-mode FC+head --block-ft-train-loss similarity": "does not reach the classifier",
        "--train-loss kl+nope": r"--train-loss: kl\+nope is none of .* nor a sum",
        "--lr inf": "--lr: inf",
        "--aa auto": "--aa auto",
        "--aa rand-m9-mstd0.5-incl": "part 'incl' is unknown",
        "--output-dir tiny.pth/x": "a file is in its place",
        "--distributed": "--distributed: not started by torchrun",
        "--output-dir out --resume": "--resume: no run in out",
        "--mixup 0.8 --batch-size 1": "--mixup, --cutmix: pair the images",
        "--no-such-flag": "--no-such-flag",
        "--epochs 0 --block-ft-epochs 0": "nothing would train",
    },
    RUN: {"": "no published weights"},
    ON_FOLDER: {
        "--data-path empty": "class1: an empty class folder",
        "--mode train --data-path good --base-weight TEACHER": "10 classes",
    },
    "main.py --mode train": {
        "--dataset DIGITS --resume auto": "--resume auto: needs the run's folder",
        "--dataset IMNET --data-path good": "2 classes, but IMNET has 1000.*FOLDER",
        "--dataset FOLDER --data-path good": "knows 1000 classes, but not 'class0'",
    },
    "main.py --mode train --dataset DIGITS --base-model": {
        "swin_tiny_patch4_window7_224": "error: --base-model swin.* is a SwinTransformer",
        "vit_base_r50_s16_224": "error: --base-model vit_base_r50.* is a hybrid",
        "vit_dwee_patch16_reg1_gap_256": "error: --base-model vit_dwee.* has DiffAttention",
        "vit_base_patch16_224_in21k": "name vit_base_patch16_224.augreg_in21k",
        "vit_tiny_patch16_224.nonsense": "leave .nonsense out",
        "vit_tiny_patch61_224": "did you mean vit_tiny_patch16_224",
        "vit_small_patch14_dinov2": "has no classifier; give it one with --mode teacher",
    },
    "main.py --mode teacher": {f"{' '.join(DIGITS)} --step=2": "--step: --mode teacher does not use it"},
    f"main.py --mode eval {' '.join(EVAL)}": {
        "--far-weight tiny.pth": "not a FAR checkpoint",
        "--far-weight TEACHER": "holds a teacher",
    },
    "main.py --mode teacher --dataset wds/x --data-path tars": {
        "--data-path nowhere": "--data-path nowhere/_info.json: .*put the tars' _info.json there",
        "--data-path lost": "lost/digits-validation-0001.tar: not there, but _info.json names it",
        "--nb-classes 9": "--nb-classes 9: --dataset wds/x has 10",
        "--holdout 0.1": "--holdout: not with --dataset wds/x",
        "--train-subset 0.5": "--train-subset: not with --dataset wds/x",
        "--repeated-aug": "--repeated-aug: not with --dataset wds/x",
        "--download": "--download: not with --dataset wds/x",
        "--dataset hfds/mnist": "--dataset: hfds/mnist: .* take FOLDER, or .* take wds/NAME",
    },
    "main.py --mode downstream --dataset DIGITS": {
        "--ds-pruned --far-weight FAR": "--ds-pruned",
        "--scale Base": "PRETRAINED_PATH",
        "--scale Tiny --far-weight FAR": "--scale",
    },
    "main.py --mode predict --far-weight FAR": {
        "": "--images: none given",
        "--images broken --output a.csv": "broken.png: not a readable image",
        "--images pictures --output a.txt": ".csv or .json",
        "--images pictures --output none/a.csv": "name another",
        "--images pictures --dataset DIGITS": "--dataset: --mode predict does not use it",
    },
    UNLABELLED: {
        "": "stage attn: the loss combine reads labels.*preserve",
        f"{' '.join(PRESERVE)} --finetune-head": "stage head: the loss classification reads labels",
        f"{' '.join(PRESERVE)} --data-path empty/train/class1": "no training images",
    },
    f"main.py {PICTURES}": {
        "--mode teacher": "has no labels to learn from",
        "--mode downstream --far-weight FAR": "has no labels to learn from",
    },
    f"prune.py {PICTURES} --model-path FAR --keep-ratio 0.5": {
        "": "name its weights with --base-weight",
        "--base-weight TEACHER --distill-loss combine": "the loss combine reads labels",
    },
    f"prune.py --model-path FAR {' '.join(SMALL)}": {
        "--keep-ratio 0.5 --sensitivity 1": "--sensitivity and --keep-ratio",
        "--keep-ratio 0": "--keep-ratio",
        "--sweep 0.5,x": "--sweep",
        "--keep-ratio 0.01": "smallest possible is 0.03125",
        "--target-params 1000": "smallest possible",
        "--distill": "--base-weight",
        "--latency-batch 8": "--latency-batch",
    },
    "visualization.py": {
        "": "make demo",
        "--far-weight FAR --images nowhere": "--images nowhere",
        "--far-weight FAR --images broken": "broken.png",
        "--far-weight FAR --block 9": "--block 9",
        "--far-weight gru.pth --lstm-backend cpu": "--lstm-backend cpu",
    },
    EXPORT: {
        "--to tflite": "--to",
        "--to onnx --output far.pt2": "--output far.pt2",
        "--to onnx --opset 16": "--opset 16",
        "--to pt2 --opset 18": "--opset",
        "--to pt2 --int8": "--int8",
        "--to onnx --aot": "--aot",
        "--to onnx --precision bfloat16": "--precision: means something for --to engine alone",
        "--to onnx --scale Tiny": "--scale",
        "--to onnx --images . --dataset DIGITS": "--images",
        "--to onnx --base-weight tiny.pth": "--far-weight, --base-weight",
        "--to onnx --far-weight mixer.pth": "block 1: TokenMixer",
        "--to engine --far-weight gru.pth": "--to engine: .*; use --to pt2",
    },
    "benchmark.py": {"--device cuda --runtimes OpenVINO": "--runtimes: --device cuda does not use it"},
    "study.py": {"--rows nope": "--rows nope"},
    "real.py": {"--input-size 100": "multiple of its patch size, 14", "--output-dir tiny.pth/run": "--output-dir"},
}
LINES = [(f"{begins} {goes_on}", said) for begins, rows in MISTAKES.items() for goes_on, said in rows.items()]


@pytest.mark.parametrize(("line", "said"), LINES, ids=[said for _, said in LINES])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(line, said, mistake, world):
    script, _, flags = line.partition(".py ")
    module = importlib.import_module(script)
    mistake(flags, said, script=module.benchmark if script == "benchmark" else module.main, folder=world)
