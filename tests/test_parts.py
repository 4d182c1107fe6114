"""The interface of the replacements: cost, fused form, kernel; a class that leaves a part out cannot be made."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deploy.fuse import fuse, merge_blocks
from models.count import count_macs
from models.kernels import cpu
from models.mixer import TokenMixer
from models.parts import Replacement
from models.replace import REPLACEMENTS, FarConfig, build, set_backend
from utils.errors import FarError

EACH = pytest.mark.parametrize("rep_by", REPLACEMENTS)
CPU = torch.device("cpu")


def model_of(rep_by, replaced=(0, 1, 3), size=32, **kwargs):
    units = {"1": [[5, 32], [1, 7]]} if rep_by in ("multi-lstm", "gru", "mingru") and 1 in replaced else {}
    config = FarConfig("DeiT-Micro", 10, size, rep_by, replaced=replaced, units=units, **kwargs)
    model = build(config).double().eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False)


@EACH
def test_macs_are_those_that_torch_counts_product_by_product(rep_by):
    model = model_of(rep_by, mlp={"1": 17})
    model.blocks[2].attn.fused_attn = False  # torch's counter passes over its fused attention on a CPU
    set_backend(model, "reference")  # a loop of plain matrix products
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert count_macs(model) == counter.get_total_flops() // 2


@EACH
def test_fuse_keeps_the_logits_in_float64(rep_by):
    model, x = model_of(rep_by), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected, fused = model(x), fuse(model)
    torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(x), expected)  # the model itself stays as it is
    torch.testing.assert_close(fused.forward_features(x), model.forward_features(x), rtol=1e-10, atol=1e-10)


@EACH
def test_a_fused_models_macs_are_those_that_torch_counts(rep_by):
    model = model_of(rep_by, (0, 1, 2, 3))
    set_backend(model, "reference")
    model = merge_blocks(model)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert count_macs(model) == counter.get_total_flops() // 2


@pytest.mark.parametrize("rep_by", ["gru", "mingru"])
def test_other_cells_are_refused_by_kernels_for_lstms_before_a_run(rep_by):
    for backend in ("cpu", "triton"):
        with pytest.raises(FarError, match=f"--lstm-backend {backend}: computes LSTMs alone; use auto or torch"):
            REPLACEMENTS[rep_by].check_backend(backend, CPU)
    for backend in ("auto", "torch", "reference"):
        REPLACEMENTS[rep_by].check_backend(backend, CPU)


def test_what_the_engine_lacks_is_refused_in_bfloat16():
    with pytest.raises(FarError, match="--fuse bfloat16: MultiHeadBiGRU in attention's place; use --fuse float32"):
        fuse(model_of("gru").float(), torch.bfloat16)


INTERFACE = "mix operations unit_norms dead_units consumers params_removed shrink sizes full_sizes".split()


@pytest.mark.parametrize("missing", INTERFACE)
def test_a_replacement_without_a_part_of_the_interface_cannot_be_made(missing):
    members = {name: getattr(TokenMixer, name) for name in INTERFACE if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (Replacement,), members)(64, 2, 65)


@pytest.mark.parametrize(
    ("rep_by", "train", "compiler"),
    [("multi-lstm", False, "inductor"), ("multi-lstm", True, "aot_eager"), ("mingru", True, "aot_eager")],
)
def test_a_whole_model_compiles_as_one_graph_with_its_gradients(rep_by, train, compiler, monkeypatch):
    model = build(FarConfig("DeiT-Micro", 10, 32, rep_by, replaced=(2,))).train(train).requires_grad_(train)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    monkeypatch.setattr(cpu, "_build", None)  # the operators are there; a trace hashes and builds nothing
    got = torch.compile(model, fullgraph=True, backend=compiler)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if train:
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (got, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@EACH
def test_a_whole_model_is_captured_by_export(rep_by):
    model = model_of(rep_by, (1,), size=16).float()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
