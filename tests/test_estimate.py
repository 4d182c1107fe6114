"""estimate.py: counts against hand and torch, then a cost model that is a function of counts and constants alone."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import estimate as script
from deploy.crossbars import (
    COMPONENTS,
    CONSTANTS,
    MAPPINGS,
    Hardware,
    count_events,
    estimate,
    find_times,
    find_turns,
    join,
    reorder,
)
from deploy.fuse import merge_blocks
from models.operations import Counts, Operation, count, operations
from models.replace import REPLACEMENTS, FarConfig, build, pack, pruned_to, set_backend, swap_attention
from models.vit import adapt_mlps
from tests.conftest import ROOT, report
from utils.checkpoint import save

PROFILES = sorted((ROOT / "hardware").glob("*.toml"))
ISAAC = Hardware.read(ROOT / "hardware/isaac.toml")


def toy(rep_by="multi-lstm"):
    """Two blocks, the second one replaced: 4 patches of 4 pixels and a class token, D 8, 2 heads, MLPs of 16."""
    model = VisionTransformer(8, 4, num_classes=3, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2)
    swap_attention(adapt_mlps(model), [1], rep_by)
    return model.eval()


def operations_of(config: FarConfig) -> list[Operation]:
    """Of a model without weights: those of a DeiT take a second to draw."""
    with torch.device("meta"):
        return list(operations(build(config)))


def test_counts_of_a_toy_are_those_of_a_pencil():
    n, d = 5, 8  # tokens, width; heads of 4 channels
    static = 4 * 48 * d  # patches
    static += n * (d * 24 + d * d)  # block 0: queries, keys, values; output
    static += n * (d * d + 4 * (16 * 4 + 16 * 4) + 2 * 4 * 8 + d * d)  # block 1: pre; 4 cells of 4 units; heads; post
    static += 2 * n * 2 * d * 16  # MLPs
    static += d * 3
    elementwise = 4 * d + 4 * d  # patches: bias, position
    elementwise += 5 * 7 * n * d + 4 * n * d  # 5 norms, 4 residual sums
    elementwise += n * 24 + (n * d + 4 * 2 * n * n) + n * d  # qkv's biases; scale and softmax; proj's biases
    elementwise += n * d + (4 * 16 + 8 * 16) * n + n * d + n * d  # pre; gates' biases and 16 units' steps; heads; post
    elementwise += 2 * (n * 16 * 5 + n * d)  # MLPs: bias and GELU; bias
    elementwise += 3
    functions = 5 * n  # a root a token and norm
    functions += 2 * n * n + 2 * n  # softmax: exponentials, reciprocals
    functions += 5 * 16 * n  # LSTM: three sigmoids, two tanhs
    functions += 2 * n * 16
    reads = 4 * 48 + 4 * d  # patches, their positions
    reads += 5 * n * d + 4 * 2 * n * d  # norms, residual sums
    reads += n * d + (n * d + n * d) + (2 * n * n + n * d) + n * d  # qkv; queries, keys; scores, values; proj
    reads += n * d + n * 16 + n * (16 + 64 + 16) + n * 16 + n * d  # pre; cells' inputs; h, gates, c; heads; post
    reads += 2 * (n * d + n * 16)
    reads += d
    writes = n * d + 5 * n * d + 4 * n * d
    writes += n * 24 + 2 * n * n + n * d + n * d
    writes += n * d + n * 64 + n * 32 + n * d + n * d
    writes += 2 * (n * 16 + n * d)
    writes += 3
    chain = 1 + (4 + 2) + (1 + 1 + n + 1 + 1 + 2) + 1
    weights = 48 * d + 24 * d + d * d + 2 * d * d + 4 * 16 * 8 + 2 * 4 * 8 + 4 * d * 16 + 3 * d
    expected = Counts(static, 2 * n * n * d, elementwise, functions, reads, writes, chain, weights)
    assert count(operations(toy())) == expected


class Functions(TorchDispatchMode):
    """Counts values of transcendental functions as torch computes them."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("sigmoid", "tanh", "gelu"):
            self.total += out.numel()
        elif name == "_softmax":
            self.total += out.numel() + out.numel() // out.shape[-1]
        elif name == "native_layer_norm":
            self.total += out[1].numel()
        return out


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rep_by", REPLACEMENTS)
def test_products_and_functions_are_those_that_torch_computes(rep_by, merged):
    model = toy(rep_by)
    model.blocks[0].attn.fused_attn = False  # torch's counter passes over its fused attention on a CPU
    set_backend(model, "reference")  # a loop of plain products and functions
    model = merge_blocks(model) if merged else model
    model.__class__ = VisionTransformer  # every token through the last block
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Functions() as functions:
        model(torch.randn(1, 3, 8, 8))
    counted = count(operations(model))
    assert 2 * (counted.static_macs + counted.dynamic_macs) == flops.get_total_flops()
    assert counted.functions == functions.total


def test_half_of_the_units_halve_what_they_should():
    whole = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 1, 2, 3))
    before, after = ({op.name: op for op in operations(build(config))} for config in (whole, pruned_to(whole, 0.5)))
    for name, op in before.items():
        share = {"weight_ih": 2, "weight_hh": 4, "head_proj": 2}.get(name.rpartition(".")[2], 1)
        assert op.macs == share * after[name].macs, name
    recurrences = [ops["blocks.0.weight_hh"] for ops in (before, after)]
    assert recurrences[0].functions == 2 * recurrences[1].functions
    assert recurrences[0].chain == recurrences[1].chain == 65


def test_a_matrix_on_crossbars_by_hand():
    # 200 x 30 weights of 8 bits, 2 bits a cell, two signs: 8 cells each, 240 columns; 2 x 2 crossbars of 128 x 128.
    op = Operation("layer", 7, ((200, 30),))
    events = count_events([op], ISAAC.design, "digital")
    slices = 8  # of one bit
    assert events["dac_pj"] == 7 * slices * 200 * 2
    assert events["adc_pj"] == events["shift_add_pj"] == 7 * slices * 240 * 2
    assert events["crossbar_pj"] == 7 * slices * 200 * 240 / 128**2
    assert events["add_pj"] == 7 * 30  # two crossbars a column: one partial sum
    assert events["buffer_bit_pj"] == 7 * 200 * 8 and not events["write_cell_pj"] and not events["mac_pj"]
    result = estimate([op], ISAAC)
    assert result.crossbars == 4 and result.used == 200 * 240 / (4 * 128**2)
    assert estimate([op], replace(ISAAC, design=ISAAC.design._replace(copies=3))).crossbars == 12
    assert result.total_uj[1] == pytest.approx(sum(events[key] * ISAAC.constants[key][1] for key in events) / 1e6)


def test_energy_is_linear_in_each_constant():
    ops = list(operations(toy()))
    for mapping in MAPPINGS:
        before = estimate(ops, ISAAC, mapping)
        for component, keys in COMPONENTS.items():
            for key in keys:
                doubled = {**ISAAC.constants, key: 2 * ISAAC.constants[key]}
                after = estimate(ops, replace(ISAAC, constants=doubled), mapping)
                grown = before.events[key] * ISAAC.constants[key] / 1e6
                np.testing.assert_allclose(after.energy_uj[component] - before.energy_uj[component], grown, atol=1e-12)
                np.testing.assert_allclose(after.total_uj - before.total_uj, grown, atol=1e-12)


def test_tokens_flow_and_chains_do_not():
    step, digital = 800, 0.833  # ns: 8 slices of 100 ns; the elementwise work behind a product
    token = Operation("token", 5, ((8, 8),))
    latency, interval = find_times([token, token], ISAAC, "digital")
    assert latency == pytest.approx(6 * step + 2 * digital) and interval == 5 * step
    waiting = [token, token._replace(waits="all")]
    assert find_times(waiting, ISAAC, "digital")[0] == pytest.approx(10 * step + 2 * digital)
    chain = Operation("chain", 5, ((8, 8),), waits="previous")
    assert find_times([chain], ISAAC, "digital") == pytest.approx((5 * (step + digital),) * 2)
    # Four at once: 5 tokens take a step and a quarter of one for each that follows; of a chain it is four images.
    copies = replace(ISAAC, design=ISAAC.design._replace(copies=4))
    assert find_times([token], copies, "digital") == pytest.approx((step + step + digital, 5 * step / 4))
    assert find_times([chain], copies, "digital") == pytest.approx((5 * (step + digital), 5 * (step + digital) / 4))
    # The last token is the first of the way back: a chain on a pipeline ends a pass after its last input is there.
    assert find_times([token, chain], ISAAC, "digital")[0] == pytest.approx(10 * step + 6 * digital)


def test_arrays_of_activations_are_busy_with_writing_and_with_all_their_products():
    n, step, row = 5, 800, 85.7
    scores = Operation("scores", n, ((4, n),) * 2, stored=False, written=n * 8, waits="all")
    values = Operation("values", n, ((n, 4),) * 2, stored=False, written=n * 8)
    latency, interval = find_times([scores, values], ISAAC, "written")
    assert interval == pytest.approx(n * step + n * row)  # the longer of both arrays' sides, row after row
    assert latency == pytest.approx(n * row + (n + 1) * step + 2 * 0.833)
    shared = values._replace(written=0, waits="all")
    latency, interval = find_times([scores, shared], ISAAC, "reordered")
    assert interval == pytest.approx(2 * n * step + n * row) and latency == pytest.approx(2 * (n * step + 0.833))
    few = replace(ISAAC, design=ISAAC.design._replace(multipliers=10))  # 40 products a query, 4 turns
    assert find_times([scores], few, "digital")[1] == pytest.approx(n * 4 * 0.833)


@pytest.mark.parametrize(("rep_by", "matrices"), [("multi-lstm", [(8, 16)]), ("gru", [(8, 8), (4, 4), (4, 4)])])
def test_a_cells_two_products_share_columns_where_they_only_add_up(rep_by, matrices):
    ops = list(operations(toy(rep_by)))
    (cell,) = (op for op in join(ops) if op.waits == "previous")
    inputs, hidden = (op for op in ops if op.name.endswith(("weight_ih", "weight_hh")))
    assert cell.matrices == tuple(matrices) * 4 and cell.macs == inputs.macs + hidden.macs
    units, gates, states = 5 * 16, *{"multi-lstm": (4, 2), "gru": (2, 1)}[rep_by]  # a token; sums; of the cell
    assert cell.elementwise == inputs.elementwise + hidden.elementwise - gates * units
    read = 5 * 4 * sum(rows for rows, _ in matrices) + (states - 1) * units  # a product has read the hidden state
    assert (cell.reads, cell.writes) == (read, states * units)
    assert [op.name for op in join(ops) if op is not cell and op.waits != "previous"] == [
        op.name for op in ops if op not in (inputs, hidden)
    ]


def test_the_recurrence_bounds_an_images_latency():
    ops = operations_of(FarConfig("DeiT-Tiny", 1000, 224, replaced=tuple(range(12))))
    many = replace(ISAAC, design=ISAAC.design._replace(copies=1000))
    assert 12 * 197 * 0.8 < estimate(ops, many).latency_us < 1.1 * 12 * 197 * 0.8
    halved = replace(many, design=many.design._replace(input_bits=4))
    assert estimate(ops, halved).latency_us == pytest.approx(estimate(ops, many).latency_us / 2, rel=0.01)


def test_the_three_mappings_of_attention_at_the_size_of_a_vit_base():
    ops = operations_of(FarConfig("DeiT-Base", 1000, 224))
    n, dim, heads = 197, 768, 12
    dynamic = {mapping: [op for op in o if not op.stored] for mapping, o in (("as is", ops), ("X", list(reorder(ops))))}
    assert sum(op.macs for op in dynamic["as is"]) == 12 * 2 * n * n * dim
    assert sum(op.macs for op in dynamic["X"]) == 12 * 2 * heads * n * n * dim  # every head reads all of X
    assert sum(op.macs for op in reorder(ops) if op.stored) == sum(op.macs for op in ops if op.stored)
    results = {mapping: estimate(ops, ISAAC, mapping) for mapping in MAPPINGS}
    assert results["written"].writes == 12 * 2 * n * dim * 8
    assert results["reordered"].writes == 12 * n * dim * 8
    # A billion writes, one an image; the slowest operation takes 128 rows of writing and 197 tokens of 0.8 us.
    assert results["written"].lifetime_h[1] == pytest.approx(1e9 * (128 * 85.7e-9 + 197 * 0.8e-6) / 3600)
    assert results["digital"].lifetime_h is None
    assert results["digital"].writes == 0 and results["digital"].events["mac_pj"] == 12 * 2 * n * n * dim
    assert results["written"].energy_uj["writing cells"][2] > 1000 * results["written"].energy_uj["writing cells"][0]


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_a_shipped_profile_has_every_constant_with_unit_and_source(file):
    hardware = Hardware.read(file)
    assert all(key.endswith(("_pj", "_ns", "_writes")) for key in CONSTANTS)
    assert {key for keys in COMPONENTS.values() for key in keys} == {key for key in CONSTANTS if key.endswith("_pj")}
    assert set(hardware.constants) == set(CONSTANTS)


FAULTS = {
    "lacks adc_pj": ("adc_pj = ", "# "),
    "cycle_ns: needs 0 <= low <= value <= high": ("cycle_ns = {value = 100", "cycle_ns = {value = -100"),
    "crossbar_pj: lacks its source": ('source = "ISAAC, table I: 2.4', 'source = ""}#'),
    "dac_pj: may have high, low, node_nm, source, value alone": ("low = 0.3906", "lwo = 0.3906"),
    "has an unknown extra": ("[design]", "[extra]\n[design]"),
    "rows = 0: must be a whole number from 1": ("rows = 128", "rows = 0"),
    "give a file like hardware/isaac.toml": ("[design]", "[design"),
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_faulty_profile_is_one_line_that_names_the_key(line, tmp_path, mistake):
    text = (ROOT / "hardware/isaac.toml").read_text()
    assert FAULTS[line][0] in text
    (tmp_path / "faulty.toml").write_text(text.replace(*FAULTS[line], 1))
    mistake("--hardware faulty.toml", re.escape(line), script=script.main)


def test_a_run_prints_writes_and_draws(tmp_path, capsys):
    config = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), units={"2": [[5, 9], [32, 32]]})
    save(tmp_path / "far.pth", pack(build(config), config))
    flags = "--base-model DeiT-Micro --rep-by multi-lstm mixer --keep-ratio 0.25 --input-bits 4 --copies 2"
    argv = [*flags.split(), "--far-weight", str(tmp_path / "far.pth"), "--output-dir", str(tmp_path / "out")]
    assert script.main(argv) == 0
    record = report(tmp_path / "out", "estimate.json")
    file = str(tmp_path / "far.pth")
    far = ["DeiT-Micro, multi-lstm", "DeiT-Micro, multi-lstm, 0.25", "DeiT-Micro, mixer"]  # it has no units
    attention = "DeiT-Micro, 32 px, 10 classes"
    assert set(record["counts"]) == {attention, file, "DeiT-Micro, 32 px", *far}
    mapped = {name: [f"{name}, {mapping}" for mapping in MAPPINGS] for name in (attention, file, "DeiT-Micro, 32 px")}
    assert set(record["costs"]) == {*sum(mapped.values(), []), *far}
    assert list(record["turns"]) == [file, *far]
    assert (record["hardware"]["input_bits"], record["hardware"]["copies"]) == (4, 2)
    for name, turn in record["turns"].items():  # of what is attention in part, its cheapest mapping too
        ours, theirs = (
            min(record["costs"][way]["total_uj"][1] for way in mapped.get(model, [model]))
            for model in (name, attention if name == file else "DeiT-Micro, 32 px")
        )
        assert turn["adc_pj"]["now"] == pytest.approx(ours / theirs)
    assert (tmp_path / "out/estimate.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in record["costs"])


def test_where_two_models_cost_the_same_they_do():
    base = FarConfig("DeiT-Tiny", 1000, 224)
    far, attention = map(operations_of, (replace(base, rep_by="mingru", replaced=tuple(range(12))), base))
    rivals = [estimate(attention, ISAAC, mapping) for mapping in MAPPINGS]
    turns = find_turns(estimate(far, ISAAC), rivals, ISAAC)
    met = Counter()
    for key, turn in turns.items():
        for factor, ratio in ((0.5, turn.halved), (2, turn.doubled), (turn.even, 1)):
            if factor:
                moved = replace(ISAAC, constants={**ISAAC.constants, key: factor * ISAAC.constants[key]})
                cheapest = min(estimate(attention, moved, mapping).total_uj[1] for mapping in MAPPINGS)
                assert estimate(far, moved).total_uj[1] / cheapest == pytest.approx(ratio)
                met[factor == turn.even] += 1
    assert met[True]
