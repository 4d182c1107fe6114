"""main.py from the outside: commands as written, flags that act, mistakes told in one line."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from timm.data import ImageNetInfo

import main
from datasets.registry import SOURCES
from datasets.streams import PACKAGES
from deploy.export import TARGETS
from deploy.packed import PRECISIONS
from deploy.predict import TABLES
from engine import modes
from engine.distill import LOSSES, TERMS
from engine.hoyer import REGULARIZERS
from engine.pruning import SCORES
from engine.ranking import RANKINGS
from models.deit import TEACHERS, create_teacher, load_published_weights
from models.kernels import BACKENDS
from models.replace import REPLACEMENTS
from tests.conftest import PLAIN, QUIET, TRAIN, digits, image_folder, launch, run_ranks
from utils import names
from utils.checkpoint import load
from utils.errors import FarError


def test_the_published_torchrun_line_runs_as_written_on_a_fake_imagenet(tmp_path):
    """A DeiT-Tiny in timm's published layout, class folders of ImageNet's names, and few of their images."""
    data = image_folder(tmp_path / "data/IMNET", classes=1000, count=1, size=8)
    for number, name in enumerate(ImageNetInfo().label_names()):
        for split in ("train", "val"):
            (data / split / f"class{number}").rename(data / split / name)
    safetensors.torch.save_file(create_teacher("DeiT-Tiny", 1000, 224).state_dict(), tmp_path / "tiny.safetensors")
    line = "--mode train --rep-by multi-lstm --base-model DeiT-Tiny --batch-size 2 --scale Tiny --block-ft-lr 2e-5 "
    line += "--block-ft-batch-size 2 --skip-train-attn"
    small = "--base-weight tiny.safetensors --train-subset 0.004 --holdout 0.004 --block-ft-epochs 1 --output-dir run"
    done = run_ranks("main.py", *line.split(), *small.split(), *QUIET, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starts from fresh modules") == 1  # rank 0 alone speaks
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"last.pth", "best.pth", "log.jsonl"}
    config = load(tmp_path / "run/best.pth", "--test")["config"]
    assert config["replaced"] == tuple(range(12)) and config["base_model"] == "DeiT-Tiny"


PUBLISHED = """--batch-size 256 --epochs 200 --lr 5e-4 --warmup-epochs 5 --warmup-lr 1e-5 --sched cosine --opt adamw
--weight-decay 0.05 --drop-path 0.1 --block-ft-batch-size 256 --block-ft-epochs 100 --block-ft-lr 5e-5
--block-ft-warmup-epochs 5 --block-ft-warmup-lr 1e-6 --train-loss combine --block-ft-train-loss classification
--train-mode sequential --step 12 --seed 42 --num-workers 8 --color-jitter 0.3 --aa rand-m9-mstd0.5-inc1
--train-interpolation bicubic --reprob 0.25 --remode pixel --recount 1 --train-subset 1.0"""


def test_defaults_are_those_of_the_published_code():
    parser = main.build_parser()
    defaults = parser.parse_args([])
    assert defaults == parser.parse_args(PUBLISHED.split()) and defaults.clip_grad is None


@pytest.mark.parametrize(("mode", "trained"), [("full", ""), ("FC", ".mlp."), ("FC+head", ".mlp.")])
def test_downstream_gets_a_fresh_classifier_and_eval_reads_the_result(mode, trained, far, tmp_path, capsys):
    common = ["--dataset", "FOLDER", "--data-path", str(image_folder(tmp_path / "data", classes=3, count=2))]
    common += ["--batch-size", "4", "--num-workers", "0"]
    rate = ["--lr", "1e-3", "--unscale-lr", "--warmup-epochs", "0"]
    argv = ["--mode", "downstream", *common, *PLAIN, "--far-weight", str(far / "best.pth"), "--ds-mode", mode]
    assert main.main([*argv, *rate, "--epochs", "1", "--select", "last", "--output-dir", str(tmp_path / "run")]) == 0
    before, after = (load(path / "best.pth", "--test")["model"] for path in (far, tmp_path / "run"))
    body = {name for name in before if not name.startswith("head.")}
    changed = {name for name in body if not torch.equal(before[name], after[name])}
    assert changed == {name for name in body if trained in name} and after["head.weight"].shape[0] == 3
    capsys.readouterr()
    assert main.main(["--mode", "eval", *common, "--far-weight", str(tmp_path / "run/best.pth")]) == 0
    assert "on 6 images" in capsys.readouterr().out


def test_published_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FarError, match="^--base-weight: no weights for DeiT-Tiny: .*--base-weight FILE$"):
        load_published_weights(create_teacher("DeiT-Tiny", 1000, 224), "DeiT-Tiny")


def test_torchrun_without_distributed_is_told(failure, teacher, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--distributed is missing" in failure(*TRAIN, "--base-weight", teacher)


def test_resume_with_other_arguments_names_the_first_that_differs(failure, far, teacher, tmp_path):
    run = shutil.copytree(far, tmp_path / "run")
    args = [*TRAIN, "--base-weight", teacher, "--epochs", "1", "--output-dir", run, "--block-ft-epochs"]
    assert "--block-ft-epochs 1, not 2" in failure(*args, "2", "--resume")
    assert "already holds a run" in failure(*args, "1")
    record = json.loads((run / "args.json").read_text())
    del record["args"]["mixup_prob"]
    for damaged, said in ((record, "another version of FAR"), ({**record, "contents": None}, "damaged")):
        (run / "args.json").write_text(json.dumps(damaged))
        assert said in failure(*args, "1", "--resume")


def test_more_processes_than_images_is_refused():
    with pytest.raises(FarError, match="--nproc_per_node"):
        digits(0, 2, train_subset=0.001)


def test_help_is_grouped_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    for piece in ("distillation:", "augmentation:", "(default: 0.0005)", "(default: cosine)"):
        assert piece in text
    assert "None" not in text and "False" not in text and "Path(" not in text


def test_help_does_not_wait_for_torch(tmp_path):
    program = """
import contextlib, importlib, sys
for name in ("main", "prune", "visualization", "export", "convert"):
    with contextlib.suppress(SystemExit):
        importlib.import_module(name).main(["--help"])
assert "torch" not in sys.modules
"""
    done = launch("-c", program, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("usage: ") == 5, done.stderr


def test_the_parsers_names_are_those_of_the_registries():
    tables = {"MODELS": TEACHERS, "REPLACEMENTS": REPLACEMENTS, "BACKENDS": BACKENDS, "DATASETS": SOURCES}
    tables |= {"STREAMS": PACKAGES, "LOSSES": LOSSES, "TERMS": TERMS, "PRECISIONS": PRECISIONS, "RANKINGS": RANKINGS}
    tables |= {"REGULARIZERS": REGULARIZERS, "SCORES": SCORES, "TABLES": TABLES, "EXPORTS": TARGETS}
    assert {name: tuple(table) for name, table in tables.items()} == {name: getattr(names, name) for name in tables}
    assert all(callable(getattr(modes, mode.function)) for mode in main.MODES.values())
