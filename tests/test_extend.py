"""docs/ARCHITECTURE.md's promise: whatever its table lists is one entry each."""

from dataclasses import replace
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import main
import prune
from datasets.registry import SOURCES, Digits
from engine.distill import TERMS, Term
from engine.hoyer import REGULARIZERS, unit_norms
from engine.pruning import SCORES
from engine.ranking import RANKINGS
from models import kernels
from models.deit import TEACHERS, Teacher
from models.kernels.reference import reference
from models.mixer import TokenMixer
from models.operations import linear
from models.replace import REPLACEMENTS, load_model
from tests.conftest import BATCH, BLOCK_BATCH, QUIET, report
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

        def operations(self, tokens):
            return [linear("value", self.value, 1, waits="all"), linear("post_proj", self.post_proj, tokens)]

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

    def last_first(hybrids):
        calls.add("ranking")
        return {i: -i for i in range(hybrids.depth)}

    for table, name, entry, listed in (
        (RANKINGS, "last first", last_first, "RANKINGS"),
        (TERMS, "gap", Term(gap, frozenset({"student_logits", "teacher_logits"})), "TERMS"),
        (SCORES, "alike", alike, "SCORES"),
        (REPLACEMENTS, "mean", Mean, "REPLACEMENTS"),
        (TEACHERS, "DeiT-Nano", Teacher(nano, 16, 8, published=False), "MODELS"),
        (kernels.KERNELS, "slow", kernels.Kernel(slow, lambda task: ""), "BACKENDS"),
        (SOURCES, "TOYS", replace(SOURCES["DIGITS"], build=digits), "DATASETS"),
        (REGULARIZERS, 4, squares, "REGULARIZERS"),
    ):
        monkeypatch.setitem(table, name, entry)
        monkeypatch.setattr(names, listed, (*getattr(names, listed), name))
    choices = {"score": names.SCORES, "rep_by": names.REPLACEMENTS, "reg": names.REGULARIZERS, "rank": names.RANKINGS}
    choices["lstm_backend"] = names.BACKENDS

    def reopened(build):
        """The parser as it is built where utils/names.py has the new names."""
        parser = build()
        for action in parser._actions:
            action.choices = choices.get(action.dest, action.choices)
        return parser

    for script in (main, prune):
        monkeypatch.setattr(script, "build_parser", partial(reopened, script.build_parser))

    short = f"--dataset TOYS --train-subset 0.1 --base-model DeiT-Nano --epochs 1 {' '.join([*QUIET, *BATCH])}".split()
    assert main.main(["--mode", "teacher", *short, "--output-dir", str(tmp_path / "teacher")]) == 0
    for rep_by in ("mean", "multi-lstm"):
        argv = ["--mode", "train", *short, *BLOCK_BATCH, *"--block-ft-epochs 1 --lstm-backend slow".split()]
        argv += ["--block-ft-train-loss", "similarity+2*gap", "--rep-by", rep_by]
        argv += ["--replace", "auto:1", "--rank", "last first"] if rep_by == "multi-lstm" else []
        assert (
            main.main([*argv, "--base-weight", f"{tmp_path}/teacher/best.pth", "--output-dir", f"{tmp_path}/{rep_by}"])
            == 0
        )
    far, config = load_model(tmp_path / "mean/best.pth")
    assert config.rep_by == "mean" and far(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    weight = ["--model-path", f"{tmp_path}/multi-lstm/best.pth", "--output-dir", f"{tmp_path}/prune"]
    few = "--ft-epochs 1 --ft-batch-size 64 --keep-ratio 0.5 --reg 4 --score alike".split()
    assert prune.main([*short, *few, *weight]) == 0
    assert load_model(tmp_path / "multi-lstm/best.pth")[1].replaced == (1,)
    rows = report(tmp_path / "prune", "prune_report.json")["rows"]
    assert rows[-1]["units"] == rows[0]["units"] / 2
    assert calls == {"replacement", "kernel", "data set", "regularizer", "term", "score", "ranking"}
