"""docs/ARCHITECTURE.md's promise: whatever its table lists is one entry each."""

import json
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import main
import prune
from datasets.registry import SOURCES, Digits
from engine.distill import TERMS, Term
from engine.hoyer import REGULARIZERS, unit_norms
from engine.pruning import SCORES
from models import kernels
from models.deit import TEACHERS, Teacher
from models.kernels.reference import reference
from models.mixer import TokenMixer
from models.replace import REPLACEMENTS, load_model
from tests.conftest import BATCH, BLOCK_BATCH, QUIET
from utils import names


def test_one_of_each_is_added_and_trains(monkeypatch, tmp_path):
    calls = set()

    class Mean(TokenMixer):
        """Each token reads the mean of all."""

        def __init__(self, *args):
            super().__init__(*args)
            self.fc1 = self.fc2 = self.act = nn.Identity()
            self.value = nn.Linear(self.dim, self.dim)

        def mix(self, x):
            calls.add("replacement")
            return self.value(x.mean(1, keepdim=True)).expand_as(x)

        def macs(self, shape):
            return 2 * shape[0] * shape[1] * self.dim**2

    def nano(img_size=16, **kwargs):
        return VisionTransformer(img_size=img_size, patch_size=8, embed_dim=32, depth=2, num_heads=2, **kwargs)

    def slow(kind, x, cells):
        calls.add("kernel")
        return reference(kind, x, cells)

    def digits(root, train, download):
        calls.add("data set")
        return Digits(train)

    def squares(s):
        calls.add("regularizer")
        return s.square().sum()

    def gap(view):
        calls.add("term")
        return (view.student_logits - view.teacher_logits).square().mean()

    def alike(parts, seen):
        calls.add("score")
        return {place: torch.ones_like(s) for place, s in unit_norms(parts).items()}

    for table, name, entry, choices in (
        (TERMS, "gap", Term(gap, frozenset({"student_logits", "teacher_logits"})), "TERMS"),
        (SCORES, "alike", alike, "SCORES"),
        (REPLACEMENTS, "mean", Mean, "REPLACEMENTS"),
        (TEACHERS, "DeiT-Nano", Teacher(nano, 16, 8, published=False), "MODELS"),
        (kernels.KERNELS, "slow", kernels.Kernel(slow, lambda task: ""), "BACKENDS"),
        (SOURCES, "TOYS", replace(SOURCES["DIGITS"], build=digits), "DATASETS"),
        (REGULARIZERS, 4, squares, "REGULARIZERS"),
    ):
        monkeypatch.setitem(table, name, entry)
        monkeypatch.setattr(names, choices, (*getattr(names, choices), name))

    short = ["--dataset", "TOYS", "--train-subset", "0.1", *QUIET, *BATCH, "--epochs", "1"]
    model = ["--base-model", "DeiT-Nano"]
    assert main.main(["--mode", "teacher", *model, *short, "--output-dir", str(tmp_path / "teacher")]) == 0
    teacher = ["--base-weight", str(tmp_path / "teacher/best.pth")]
    for rep_by in ("mean", "multi-lstm"):
        argv = ["--mode", "train", *model, *short, *BLOCK_BATCH, "--block-ft-epochs", "1", *teacher]
        argv += ["--block-ft-train-loss", "similarity+2*gap"]
        folder = ["--rep-by", rep_by, "--lstm-backend", "slow", "--output-dir", str(tmp_path / rep_by)]
        assert main.main([*argv, *folder]) == 0
    far, config = load_model(tmp_path / "mean/best.pth")
    assert config.rep_by == "mean" and far(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    argv = [
        *short,
        "--ft-epochs",
        "1",
        "--ft-batch-size",
        "64",
        "--keep-ratio",
        "0.5",
        "--reg",
        "4",
        *model,
        "--score",
        "alike",
    ]
    weight = ["--model-path", str(tmp_path / "multi-lstm/best.pth"), "--output-dir", str(tmp_path / "prune")]
    assert prune.main([*argv, *weight]) == 0
    report = json.loads((tmp_path / "prune/prune_report.json").read_text())
    assert report["rows"][-1]["units"] == report["rows"][0]["units"] / 2
    assert calls == {"replacement", "kernel", "data set", "regularizer", "term", "score"}
