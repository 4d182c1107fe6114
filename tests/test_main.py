"""main.py from the outside: commands as written, flags that act, mistakes told in one line."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from timm.data import ImageNetInfo

import main
from datasets.registry import SOURCES
from deploy.export import TARGETS
from deploy.packed import PRECISIONS
from deploy.predict import TABLES
from engine import modes
from engine.distill import LOSSES, TERMS
from engine.hoyer import REGULARIZERS
from engine.pruning import SCORES
from models.deit import TEACHERS, create_teacher
from models.kernels import BACKENDS
from models.replace import REPLACEMENTS
from tests.conftest import (
    BLOCK_BATCH,
    DIGITS,
    EVAL,
    PLAIN,
    QUIET,
    TRAIN,
    Started,
    image_folder,
    launch,
    run_ranks,
    torchrun,
)
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
    done = Started(
        "main.py",
        *"--mode train --rep-by multi-lstm --base-weight tiny.safetensors --batch-size 4".split(),
        *"--block-ft-batch-size 4".split(),
        *SMALL,
        *FEW,
        "--output-dir",
        "runs/one",
        cwd=imnet,
    ).finish()
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
    one = [*common, "--batch-size", "32", "--block-ft-batch-size", "32", "--output-dir", str(tmp_path / "a")]
    assert main.main(one) == 0
    two = [*common, "--batch-size", "16", "--block-ft-batch-size", "16", "--output-dir", "b"]
    two = run_ranks("main.py", *two, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
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
        argv = ["--mode", "downstream", *common, *PLAIN, "--far-weight", str(far / "best.pth"), "--ds-mode", mode]
        assert main.main([*argv, "--epochs", "1", "--select", "last", "--output-dir", str(run)]) == 0
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


@pytest.fixture(scope="module")
def world(imnet, teacher, far, tmp_path_factory):
    """A folder of files that command lines name, right and wrong ones, and the words that stand for them below."""
    root = tmp_path_factory.mktemp("world")
    image_folder(root / "good")
    for image in (image_folder(root / "empty") / "train/class1").iterdir():
        image.unlink()
    torch.save(create_teacher("DeiT-Micro", 10, 32), root / "module.pth")
    torch.save(create_teacher("DeiT-Tiny", 10, 32).state_dict(), root / "tiny.pth")
    return root, {"TEACHER": str(teacher), "FAR": str(far / "best.pth"), "IMNET": str(imnet / "data/IMNET")}


OUT = ["--output-dir", "out"]
TRAINING = [*TRAIN, *OUT, "--base-weight", "TEACHER"]
ON_FOLDER = ["--mode", "teacher", "--dataset", "FOLDER", "--scale", "Micro", *QUIET, *OUT]
ON_IMNET = ["--mode", "train", *OUT, "--dataset=IMNET", "--data-path"]
DOWNSTREAM = ["--mode", "downstream", "--dataset", "DIGITS"]
MISTAKES = [  # a line, what is added to it, and what is said
    (TRAINING, "--dataset NOPE", "--dataset: .*NOPE"),
    (TRAINING, "--base-model DeiT-Tiny", "--scale Micro"),
    (TRAINING, "--replace 0-4", "--replace 0-4"),
    (TRAINING, "--base-weight missing.pth", "--base-weight missing.pth: no such file"),
    (TRAINING, "--base-weight module.pth", "refuses to execute"),
    (TRAINING, "--base-weight tiny.pth", "another architecture|has shape"),
    (TRAINING, "--base-weight FAR", "is a FAR model"),
    (TRAINING, "--block-ft-mode FC+head --block-ft-train-loss similarity", "does not reach the classifier"),
    (TRAINING, "--opt adahessian", "--opt adahessian: .*second derivatives"),
    (TRAINING, "--block-ft-opt nope", "--block-ft-opt nope"),
    (TRAINING, "--train-loss kl+nope", r"--train-loss: kl\+nope is none of .* nor a sum"),
    (TRAINING, "--lr inf", "--lr: inf"),
    (TRAINING, "--batch-size 0", "--batch-size"),
    (TRAINING, "--aa auto", "--aa auto"),
    (TRAINING, "--aa rand-m9-mstd0.5-incl", "part 'incl' is unknown"),
    (TRAINING, "--output-dir tiny.pth/x", "a file is in its place"),
    (TRAINING, "--output-dir /proc/x", "cannot be written"),
    (TRAINING, "--distributed", "--distributed: not started by torchrun"),
    (TRAINING, "--resume", "--resume: no run in out"),
    (TRAINING, "--mixup 0.8 --batch-size 1", "--mixup, --cutmix: pair the images"),
    (TRAINING, "--no-such-flag", "--no-such-flag"),
    (TRAINING, "--download", "--download"),
    (TRAINING, "--epochs 0 --block-ft-epochs 0", "nothing would train"),
    ([*TRAIN, *OUT], "", "no published weights"),
    (["--mode", "train", "--dataset", "DIGITS"], "--resume auto", "--resume auto: needs the run's folder"),
    (["--mode", "teacher", *DIGITS], "--step=2", "--step: --mode teacher does not use it"),
    (ON_FOLDER, "--data-path nowhere", "--data-path nowhere"),
    (ON_FOLDER, "--data-path empty", "class1: an empty class folder"),
    (ON_FOLDER, "--mode train --data-path good --base-weight TEACHER", "10 classes"),
    (ON_IMNET, "good", "2 classes, but IMNET has 1000.*FOLDER"),
    (ON_IMNET, "IMNET", "--base-weight: no weights for DeiT-Tiny"),
    (["--mode", "eval", *EVAL], "--far-weight tiny.pth", "not a FAR checkpoint"),
    (["--mode", "eval", *EVAL], "--far-weight TEACHER", "holds a teacher"),
    (["--mode", "eval", *EVAL], "--lr 1", "--lr: --mode eval does not use it"),
    (["--mode", "eval"], "--dataset FOLDER --data-path good --far-weight FAR", "knows 10 classes"),
    (DOWNSTREAM, "--ds-pruned --far-weight FAR", "--ds-pruned"),
    (DOWNSTREAM, "--scale Base", "PRETRAINED_PATH"),
    (DOWNSTREAM, "--scale Tiny --far-weight FAR", "--scale"),
    (DOWNSTREAM, "--rep-by mixer", "--rep-by: --mode downstream does not use it"),
]


@pytest.mark.parametrize(("line", "added", "said"), MISTAKES, ids=[f"{i} {m[1]}" for i, m in enumerate(MISTAKES)])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(line, added, said, failure, world, monkeypatch):
    root, words = world
    monkeypatch.chdir(root)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(p.name for p in root.iterdir())
    assert re.search(said, failure(*(words.get(word, word) for word in [*line, *added.split()])))
    assert sorted(p.name for p in root.iterdir()) == before


def test_torchrun_without_distributed_is_told(failure, teacher, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--distributed is missing" in failure(*TRAIN, "--base-weight", teacher)


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
    from datasets.loading import Data
    from utils.configs import DataConfig
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
    assert tuple(PRECISIONS) == names.PRECISIONS and tuple(REGULARIZERS) == names.REGULARIZERS
    assert tuple(SCORES) == names.SCORES and tuple(TABLES) == names.TABLES and tuple(TARGETS) == names.EXPORTS
    assert all(callable(getattr(modes, mode.job)) for mode in main.MODES.values())


@pytest.mark.parametrize("script", ["main", "prune", "visualization", "export", "convert"])
def test_help_does_not_wait_for_torch(script, tmp_path):
    program = (
        f"import sys, {script}\ntry:\n    {script}.main(['--help'])\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = launch("-c", program, cwd=tmp_path)
    assert done.returncode == 0 and "--scale" in done.stdout, done.stderr
