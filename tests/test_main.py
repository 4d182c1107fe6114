"""main.py from the outside: commands as written, flags that act, mistakes told in one line."""

import json
import os
import re
import shutil

import pytest
import safetensors.torch
import torch
from timm.data import ImageNetInfo

import main
from datasets.registry import SOURCES
from deploy.export import TARGETS
from deploy.predict import TABLES
from engine import jobs
from engine.distill import LOSSES, TERMS
from engine.hoyer import REGULARIZERS
from engine.pruning import SCORES
from models.deit import TEACHERS, create_teacher
from models.kernels import BACKENDS
from models.replace import REPLACEMENTS
from tests.conftest import BATCH, BLOCK_BATCH, DIGITS, EVAL, PLAIN, QUIET, ROOT, TRAIN, image_folder, launch, torchrun
from utils import names
from utils.checkpoint import load

FEW = ["--train-subset", "0.004", "--holdout", "0.004"]
SMALL = ["--epochs", "1", "--block-ft-epochs", "1", *QUIET]


@pytest.fixture(scope="module")
def imnet(tmp_path_factory):
    """A fake IMNET and a DeiT-Tiny made here, in the layouts of the real ones."""
    root = tmp_path_factory.mktemp("imnet")
    data = image_folder(root / "data/IMNET", classes=1000, count=1, size=8)
    for number, name in enumerate(ImageNetInfo().label_names()):
        for split in ("train", "val"):
            (data / split / f"class{number}").rename(data / split / name)
    torch.manual_seed(0)
    state = create_teacher("DeiT-Tiny", 1000, 224).state_dict()
    torch.save({"model": state}, root / "tiny.pth")
    safetensors.torch.save_file(state, root / "tiny.safetensors")
    return root


def test_section_7_torchrun_line_runs_as_written_on_a_fake_imnet(imnet):
    done = launch(
        *torchrun(
            *"--mode train --rep-by multi-lstm --base-model DeiT-Tiny --batch-size 2 --scale Tiny".split(),
            *"--block-ft-lr 2e-5 --block-ft-batch-size 2 --skip-train-attn".split(),
            *SMALL,
            *FEW,
            *"--base-weight tiny.pth --output-dir runs/torchrun".split(),
        ),
        cwd=imnet,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starts from fresh modules") == 1  # rank 0 alone speaks
    assert {p.name for p in (imnet / "runs/torchrun").iterdir()} >= {"last.pth", "best.pth", "log.jsonl"}


def test_section_7_single_process_line_runs_with_timms_published_layout(imnet):
    done = launch(
        str(ROOT / "main.py"),
        *"--mode train --rep-by multi-lstm --base-weight tiny.safetensors --batch-size 4".split(),
        *"--block-ft-batch-size 4".split(),
        *SMALL,
        *FEW,
        "--output-dir",
        "runs/one",
        cwd=imnet,
    )
    assert done.returncode == 0, done.stderr
    state = load(imnet / "runs/one/best.pth", "--test")
    assert state["config"]["replaced"] == tuple(range(12)) and state["config"]["base_model"] == "DeiT-Tiny"


@pytest.mark.parametrize(
    "line",
    [
        "--distributed --mode train --rep-by multi-lstm --base-model DeiT-Base --batch-size 64 "
        "--scale Base --block-ft-lr 2e-5 "
        "--block-ft-batch-size 64 --skip-train-attn",
        "--distributed --mode train --rep-by multi-lstm --base-model DeiT-Small --batch-size 64 "
        "--scale Small --block-ft-lr 2e-5 "
        "--block-ft-batch-size 64 --skip-train-attn",
        "--mode train --rep-by multi-lstm",
        "--mode downstream --scale Small --dataset CIFAR10 --lr 5e-5 --epochs 1000 --reprob 0.0 --drop-path 0.0",
        "--mode downstream --ds-pruned --scale Base --dataset FLOWER --lr 5e-5 --epochs 1000 "
        "--reprob 0.0 --drop-path 0.0",
    ],
)
def test_the_lines_of_section_7_parse_as_written(line):
    main.build_parser().parse_args(line.split())


def test_defaults_are_those_of_the_published_code():
    args = vars(main.build_parser().parse_args([]))
    expected = {
        "batch_size": 256,
        "epochs": 200,
        "lr": 5e-4,
        "warmup_epochs": 5,
        "warmup_lr": 1e-5,
        "sched": "cosine",
        "opt": "adamw",
        "weight_decay": 0.05,
        "drop_path": 0.1,
        "block_ft_batch_size": 256,
        "block_ft_epochs": 100,
        "block_ft_lr": 5e-5,
        "block_ft_warmup_epochs": 5,
        "block_ft_warmup_lr": 1e-6,
        "train_loss": "combine",
        "block_ft_train_loss": "classification",
        "train_mode": "sequential",
        "step": 12,
        "seed": 42,
        "num_workers": 8,
        "color_jitter": 0.3,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "train_subset": 1.0,
        "clip_grad": None,
    }
    assert {k: args[k] for k in expected} == expected


def test_two_processes_with_half_the_batch_give_the_weights_of_one(teacher, tmp_path):
    common = [
        *"--mode train --dataset DIGITS --scale Micro".split(),
        *QUIET,
        "--train-subset",
        "0.1",
        "--base-weight",
        str(teacher),
        *"--epochs 2 --block-ft-epochs 1 --drop-path 0 --select last".split(),
    ]
    # Augmentation follows from the sample, not the process, so even the random crops agree.
    one = launch(
        str(ROOT / "main.py"), *common, *"--batch-size 32 --block-ft-batch-size 32 --output-dir a".split(), cwd=tmp_path
    )
    two = launch(
        *torchrun(*common, "--batch-size", "16", "--block-ft-batch-size", "16", "--output-dir", "b"), cwd=tmp_path
    )
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    a, b = (load(tmp_path / run / "best.pth", "--test")["model"] for run in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)
    ours, theirs = (json.loads((tmp_path / run / "result.json").read_text()) for run in "ab")
    assert ours["images"] == theirs["images"] == 360 and ours["acc1"] == pytest.approx(theirs["acc1"], abs=0.3)


def test_downstream_gets_a_fresh_classifier_and_eval_reads_the_result(far, tmp_path, capsys):
    data = image_folder(tmp_path / "data", classes=3)
    common = ["--dataset", "FOLDER", "--data-path", str(data), "--batch-size", "4", "--num-workers", "0"]
    for mode in ("full", "FC", "FC+head"):
        run = tmp_path / mode
        assert (
            main.main(
                [
                    "--mode",
                    "downstream",
                    *common,
                    *PLAIN,
                    "--far-weight",
                    str(far / "best.pth"),
                    "--ds-mode",
                    mode,
                    *"--epochs 1 --select last --output-dir".split(),
                    str(run),
                ]
            )
            == 0
        )
        before, after = load(far / "best.pth", "--t")["model"], load(run / "best.pth", "--t")["model"]
        changed = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
        expected = {"full": lambda k: True, "FC": lambda k: ".mlp." in k, "FC+head": lambda k: ".mlp." in k}[mode]
        assert {k for k in changed if not k.startswith("head.")} == {
            k for k in before if expected(k) and not k.startswith("head.")
        }
        assert after["head.weight"].shape[0] == 3
    capsys.readouterr()
    assert main.main(["--mode", "eval", *common, "--far-weight", str(tmp_path / "full/best.pth")]) == 0
    assert "on 12 images" in capsys.readouterr().out


def test_block_distill_starts_from_attention_stage_weights(far, teacher, tmp_path):
    weights = ["--base-weight", str(teacher), "--attn-weight", str(far / "best.pth")]
    args = ["--mode", "block-distill", *DIGITS, *BLOCK_BATCH, *weights, "--block-ft-epochs", "1"]
    assert main.main([*args, "--output-dir", str(tmp_path / "run")]) == 0
    first = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    assert first["stage"] == "block" and first["val"]["acc1"] == json.loads((far / "result.json").read_text())["acc1"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_mistakes_are_one_line_and_leave_nothing_behind(failure, teacher, far, imnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    good = image_folder(tmp_path / "good")
    empty = image_folder(tmp_path / "empty")
    for image in (empty / "train/class1").iterdir():
        image.unlink()
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(teacher.read_bytes()[:100_000])
    torch.save(create_teacher("DeiT-Micro", 10, 32), tmp_path / "module.pth")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save(create_teacher("DeiT-Tiny", 10, 32).state_dict(), tmp_path / "tiny.pth")
    before = sorted(p.name for p in tmp_path.iterdir())
    train = [*TRAIN, "--output-dir", "out"]
    weight = ["--base-weight", teacher]
    folder = ["--mode", "teacher", "--dataset", "FOLDER", "--scale", "Micro", *QUIET, "--output-dir", "out"]
    cases = [
        ([*train, *weight, "--dataset", "NOPE"], "--dataset: .*NOPE"),
        ([*folder, "--data-path", "nowhere"], "--data-path nowhere"),
        ([*folder, "--data-path", empty], "class1: an empty class folder"),
        ([*train, *weight, "--base-model", "DeiT-Tiny"], "--scale Micro"),
        ([*train, *weight, "--replace", "0-4"], "--replace 0-4"),
        ([*train, "--base-weight", truncated], "truncated.pth"),
        ([*train, "--base-weight", "missing.pth"], "--base-weight missing.pth: no such file"),
        ([*train, "--base-weight", "module.pth"], "refuses to execute"),
        ([*train, "--base-weight", "evil.pth"], "refuses to execute"),
        ([*train, "--base-weight", "tiny.pth"], "another architecture|has shape"),
        ([*train, "--base-weight", far / "best.pth"], "is a FAR model"),
        ([*folder, *weight, "--mode", "train", "--data-path", good], "10 classes"),
        (["--mode", "eval", *EVAL, "--far-weight", truncated], "truncated.pth"),
        (["--mode", "eval", *EVAL, "--far-weight", "tiny.pth"], "not a FAR checkpoint"),
        (
            ["--mode", "eval", "--dataset", "FOLDER", "--data-path", good, "--far-weight", far / "best.pth"],
            "knows 10 classes",
        ),
        (["--mode", "downstream", *DIGITS, *BATCH, "--ds-pruned", "--far-weight", far / "best.pth"], "--ds-pruned"),
        (["--mode", "downstream", "--dataset", "DIGITS", "--scale", "Base"], "PRETRAINED_PATH"),
        (
            ["--mode", "downstream", "--dataset", "DIGITS", "--scale", "Tiny", "--far-weight", far / "best.pth"],
            "--scale",
        ),
        (["--mode", "eval", *EVAL, "--far-weight", teacher], "holds a teacher"),
        (["--mode", "eval", *EVAL, "--far-weight", far / "best.pth", "--base-weight", "tiny.pth"], "tiny.pth"),
        (["--mode", "downstream", *DIGITS, "--rep-by", "mixer"], "--rep-by: --mode downstream does not use it"),
        (["--mode", "eval", *EVAL, "--lr", "1"], "--lr: --mode eval does not use it"),
        (["--mode", "teacher", *DIGITS, "--step=2"], "--step: --mode teacher does not use it"),
        (
            [*train, *weight, "--block-ft-mode", "FC+head", "--block-ft-train-loss", "similarity"],
            "does not reach the classifier",
        ),
        ([*train, *weight, "--block-ft-opt", "bnbAdam"], "--block-ft-opt bnbAdam"),
        ([*train, *weight, "--lr", "inf"], "--lr: inf"),
        ([*train, *weight, "--train-loss", "kl+nope"], "--train-loss: kl\\+nope is none of .* nor a sum"),
        ([*train, *weight, "--block-ft-train-loss", "kl+2*kl"], "--block-ft-train-loss: .* nor a sum"),
        ([*train, *weight, "--train-loss", "-1*kl"], "--train-loss"),
        ([*train, *weight, "--lr", "1e400"], "--lr: 1e400"),
        ([*train, *weight, "--weight-decay", "nan"], "--weight-decay: nan"),
        ([*train, *weight, "--batch-size", "1e20"], "whole number"),
        ([*train, *weight, "--seed", str(2**64)], "--seed"),
        ([*train, *weight, "--eval-crop-ratio", "1e-9"], "--eval-crop-ratio"),
        ([*train, *weight, "--output-dir", ""], "--output-dir: is empty"),
        ([*train, *weight, "--output-dir", truncated], "a file is in its place"),
        ([*train, *weight, "--output-dir", truncated / "x"], "a file is in its place"),
        ([*train, *weight, "--output-dir", "x" * 300], "too long"),
        ([*train, *weight, "--output-dir", "/proc/x"], "cannot be written"),
        (["--mode", "train", "--dataset", "DIGITS", "--resume", "auto"], "--resume auto: needs the run's folder"),
        ([*train, *weight, "--distributed"], "--distributed: not started by torchrun"),
        ([*train, *weight, "--resume"], "--resume: no run in out"),
        ([*train], "no published weights"),
        (
            ["--mode", "train", "--dataset", "IMNET", "--data-path", good, "--output-dir", "out"],
            "2 classes, but IMNET has 1000.*FOLDER",
        ),
        (
            ["--mode", "train", "--dataset", "IMNET", "--data-path", imnet / "data/IMNET", "--output-dir", "out"],
            "--base-weight: no weights for DeiT-Tiny",
        ),
        ([*train, *weight, "--mixup", "0.8", "--batch-size", "1"], "--mixup, --cutmix: pair the images"),
        ([*train, *weight, "--block-ft-batch-size", "1", "--cutmix", "1"], "--mixup, --cutmix: pair the images"),
        ([*train, *weight, "--aa", "auto"], "--aa auto"),
        ([*train, *weight, "--replace", "²"], "--replace ²"),
        ([*train, *weight, "--batch-size", "0"], "--batch-size"),
        ([*train, *weight, "--opt", "nope"], "--opt nope"),
        ([*train, *weight, "--no-such-flag"], "--no-such-flag"),
        ([*train, *weight, "--download"], "--download"),
        ([*train, *weight, "--epochs", "0", "--block-ft-epochs", "0"], "nothing would train"),
    ]
    for argv, expected in cases:
        assert re.search(expected, failure(*argv)), argv
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--distributed is missing" in failure(*train, *weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_resume_with_other_arguments_names_the_first_that_differs(failure, far, teacher):
    args = [*TRAIN, "--base-weight", teacher, "--epochs", "1", "--output-dir", far]
    assert "--block-ft-epochs 1, not 2" in failure(*args, "--block-ft-epochs", "2", "--resume")
    assert "already holds a run" in failure(*args, "--block-ft-epochs", "1")


def test_a_run_of_an_earlier_version_had_the_defaults_of_flags_it_did_not_know(failure, far, teacher, tmp_path):
    run = shutil.copytree(far, tmp_path / "run")
    record = json.loads((run / "args.json").read_text())
    del record["args"]["mixup_prob"], record["args"]["model_ema"]
    (run / "args.json").write_text(json.dumps(record))
    args = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "1"]
    args += ["--output-dir", str(run), "--resume"]
    assert "with --mixup-prob 1.0, not 0.5" in failure(*args, "--mixup-prob", "0.5")
    assert main.main(args) == 0


def test_an_undecodable_image_stops_the_run_by_name(failure, tmp_path):
    root = image_folder(tmp_path / "data")
    (root / "train/class0/2.jpg").write_bytes(b"broken")
    line = failure(
        *"--mode teacher --dataset FOLDER --data-path".split(),
        root,
        "--scale",
        "Micro",
        *QUIET,
        *"--epochs 1 --batch-size 4 --output-dir".split(),
        tmp_path / "run",
    )
    assert "class0/2.jpg: not a readable image" in line


def test_more_processes_than_images_is_refused(teacher):
    from datasets.loading import Data, DataConfig
    from utils.distributed import Context
    from utils.errors import FarError

    with pytest.raises(FarError, match="--nproc_per_node"):
        Data(DataConfig("DIGITS", None, 32, train_subset=0.001), Context(0, 2))


def test_help_is_grouped_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    for piece in ("distillation:", "augmentation:", "(default: 0.0005)", "(default: cosine)"):
        assert piece in text
    assert "None" not in text and "False" not in text and "Path(" not in text and "default" in text


def test_the_parsers_names_are_those_of_the_registries():
    assert tuple(TEACHERS) == names.MODELS and tuple(REPLACEMENTS) == names.REPLACEMENTS and BACKENDS == names.BACKENDS
    assert tuple(SOURCES) == names.DATASETS and tuple(LOSSES) == names.LOSSES and tuple(TERMS) == names.TERMS
    assert tuple(jobs.FUSE) == names.PRECISIONS and tuple(REGULARIZERS) == names.REGULARIZERS
    assert tuple(SCORES) == names.SCORES and tuple(TABLES) == names.TABLES and tuple(TARGETS) == names.EXPORTS
    assert all(callable(getattr(jobs, mode.job)) for mode in main.MODES.values())


@pytest.mark.parametrize("script", ["main", "prune", "visualization", "export", "convert"])
def test_help_does_not_wait_for_torch(script, tmp_path):
    program = (
        f"import sys, {script}\ntry:\n    {script}.main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = launch("-c", program, cwd=tmp_path)
    assert done.returncode == 0 and "--scale" in done.stdout, done.stderr
