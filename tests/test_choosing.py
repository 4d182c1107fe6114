"""--lstm-backend auto where it measures: what differs from torch is left out, the fastest right kernel is taken."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import main
from models import choosing, kernels
from models.choosing import KERNELS_FILE, choose_kernels
from models.replace import FarConfig, build, replacements
from tests.conftest import TRAIN, report
from utils.distributed import Context
from utils.run_folder import RunFolder

stock = kernels.KERNELS["torch"].run

ALONE = Context()


def scaled(kind, x, cells):
    return stock(kind, x, cells) * 1.001


def without_a_gradient(kind, x, cells):
    first, *others = cells
    return stock(kind, x, [first._replace(bias_hh=first.bias_hh.detach() + 0 * first.bias_hh), *others])


def not_a_number(kind, x, cells):
    return stock(kind, x, cells).masked_fill(x.sum() == x.sum(), float("nan"))


def raising(kind, x, cells):
    raise ValueError("no tensor cores\non this card")


WRONG = {"scaled": scaled, "no gradient": without_a_gradient, "nan": not_a_number, "raising": raising}
SECONDS = {"torch": 5e-3, "slow": 9e-3, "quick": 1e-3, "no gradient": 6e-3}


@pytest.fixture(autouse=True)
def candidates(monkeypatch):
    """On a CPU, kernels by these names; they take SECONDS, and what is wrong must not be timed."""
    for name, run in {**WRONG, "slow": partial(stock), "quick": partial(stock)}.items():
        monkeypatch.setitem(kernels.KERNELS, name, kernels.Kernel(run, lambda task: ""))
    monkeypatch.setitem(choosing.CANDIDATES, "cpu", ("torch", *WRONG, "slow", "quick"))

    class Timer:
        def __init__(self, call, globals):
            self.name = globals["args"][0]

        def blocked_autorange(self, min_run_time):
            return SimpleNamespace(median=SECONDS[self.name])

    monkeypatch.setattr(choosing, "Timer", Timer)


def tiny(**kwargs):
    return build(FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), **kwargs))


def backends(model):
    return {attn.backend for attn in replacements(model).values()}


def test_what_is_wrong_or_fails_is_left_out_with_a_line_and_the_fastest_is_taken(capsys):
    model, state = tiny(), torch.get_rng_state()
    choose_kernels(model, "auto", 6, ALONE)
    assert backends(model) == {"quick"} and torch.equal(state, torch.get_rng_state())
    lines = capsys.readouterr().out.splitlines()
    what = "2 heads of 32 units, batch 6, 65 tokens, training on cpu: "
    assert len(lines) == 5 and all(what in line for line in lines)
    for line, said in zip(lines, ("by 1.0e-03", "by 1.0", "by nan", "no tensor cores"), strict=False):
        assert " is left out: " in line and said in line
    assert lines[-1].endswith(": quick of torch 5 ms, slow 9 ms, quick 1 ms")


def test_a_resumed_run_takes_the_same_kernel_and_another_card_its_own(tmp_path, monkeypatch, capsys):
    run = RunFolder(tmp_path, ALONE, False)
    choose_kernels(tiny(), "auto", 6, ALONE, run)
    capsys.readouterr()
    monkeypatch.setitem(SECONDS, "quick", 1.0)
    choose_kernels(model := tiny(), "auto", 6, ALONE, run)
    assert backends(model) == {"quick"} and not capsys.readouterr().out
    (tmp_path / KERNELS_FILE).write_text((tmp_path / KERNELS_FILE).read_text().replace("on cpu", "on another card"))
    choose_kernels(model, "auto", 6, ALONE, run)
    assert backends(model) == {"torch"}


def test_a_training_chooses_computes_so_and_writes_it_down(teacher, tmp_path, monkeypatch):
    ran = []
    for name in ("quick", "torch", "cpu"):
        run = lambda *args, name=name: (ran.append(name), stock(*args))[1]  # noqa: E731
        monkeypatch.setitem(kernels.KERNELS, name, kernels.Kernel(run, lambda task: ""))
    monkeypatch.setattr(choosing, "fastest", lambda *_: "quick")
    argv = [*TRAIN, "--base-weight", str(teacher), "--epochs", "1", "--block-ft-epochs", "0"]
    assert main.main([*argv, "--output-dir", str(tmp_path / "run")]) == 0
    assert set(ran) == {"quick"}
    assert set(report(tmp_path / "run", KERNELS_FILE)["kernels"].values()) == {"quick"}
