"""--compile: what is computed stays the same, and nothing of it is left on the models."""

import pytest
import torch
from torch._dynamo.utils import counters

import main
from engine import compiling
from engine.compiling import check_compiler, compiled
from engine.distill import Distillation
from engine.stages import Stage
from models.deit import create_teacher
from models.replace import swap_attention
from utils.checkpoint import load
from utils.configs import Optim
from utils.errors import FarError

FLAGS = """--dataset DIGITS --scale Micro --num-workers 0 --select last --holdout 0.02 --train-subset 0.06 --replace 1
--skip-train-attn --block-ft-epochs 1 --block-ft-batch-size 24 --block-ft-train-loss combine --device cpu
--eval-every 9 --drop-path 0.3""".split()


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Traced as by torch's own compiler, which would take minutes, but computed by torch's ordinary operators."""
    monkeypatch.setattr(compiling, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_run_computes_what_an_ordinary_one_does(teacher, tmp_path):
    flags = [*FLAGS, "--base-weight", str(teacher)]
    assert main.main([*flags, "--output-dir", str(tmp_path / "plain")]) == 0
    assert not counters["stats"]["unique_graphs"]
    assert main.main([*flags, "--output-dir", str(tmp_path / "compiled"), "--compile"]) == 0
    assert counters["stats"]["unique_graphs"] > 4 and not counters["graph_break"]
    plain, other = (load(tmp_path / run / "best.pth", "--test") for run in ("plain", "compiled"))
    assert plain["config"] == other["config"] and plain["model"].keys() == other["model"].keys()
    for name, weight in plain["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_blocks_are_compiled_within_and_as_before_afterwards():
    teacher, student = (create_teacher("DeiT-Micro", 10, 32) for _ in range(2))
    swap_attention(student, (0, 1), "multi-lstm")
    stage = Stage("s", (0, 1), (0, 1), "mixing", "similarity", "z", Optim(1, 2, 1e-3))
    task = Distillation(student.eval(), stage, torch.nn.CrossEntropyLoss(), teacher).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    expected, _ = task(images, labels)
    with compiled(task):
        torch.testing.assert_close(task(images, labels)[0], expected)
        student(images)  # an evaluation
        assert not any("z" in vars(block.attn.proj) for block in student.blocks)  # nothing is held on to
    assert counters["stats"]["unique_graphs"]
    for block in (*teacher.blocks, *student.blocks):
        assert "forward" not in vars(block) and not block.attn.proj._forward_pre_hooks


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(compiling, "COMPILER", "none such")
    with pytest.raises(FarError, match=r"^--compile: torch cannot compile here \(.*none such.*\); leave it out"):
        check_compiler(torch.device("cpu"))
