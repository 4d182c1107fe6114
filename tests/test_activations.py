"""What units carry, and the closed form that makes up for removed ones, against numpy on hidden states written out."""

import copy

import numpy as np
import pytest
import torch

from engine.activations import RIDGE, activation_score, refit, unit_grams
from engine.hoyer import unit_norms
from engine.shrink import keep_share, shrink
from models.replace import mlps, replacements
from tests.conftest import FLOAT32, relative_error
from tests.test_prune import RECURRENT, ragged
from utils.distributed import Context


def images_of():
    return torch.randn(7, 3, 16, 16, dtype=torch.float64)


def grams_of(model, parts, images):
    return unit_grams(model, parts, images.split(3), Context(), FLOAT32)


@torch.no_grad()
def written_out(model, images):
    """Values of all hidden units, (B N, u) in numpy: of each replaced block's heads, and of each MLP."""
    x, heads, hidden = model._pos_embed(model.patch_embed(images)), {}, {}
    for i, block in enumerate(model.blocks):
        if i in replacements(model):
            attn, read = block.attn, block.norm1(x)
            p = attn.pre_proj(read).view(*read.shape[:2], attn.num_heads, attn.width)
            split = attn.hidden(p).split([sum(pair) for pair in attn.sizes], dim=2)
            heads |= {(i, h): units.flatten(0, 1).numpy() for h, units in enumerate(split)}
        between = x + block.attn(block.norm1(x))
        hidden[i] = block.mlp.act(block.mlp.fc1(block.norm2(between))).flatten(0, 1).numpy()
        x = block(x)
    return heads, hidden


def score_by_hand(units, reader):
    columns = reader.weight.detach().numpy()
    return [units[:, j].std() * np.linalg.norm(columns[:, j]) for j in range(units.shape[1])]


@RECURRENT
def test_a_units_score_is_its_deviation_times_its_column(rep_by):
    model, images = ragged(rep_by), images_of()
    heads, hidden = written_out(model, images)
    found = activation_score(replacements(model), grams_of(model, replacements(model), images))
    assert found.keys() == unit_norms(replacements(model)).keys()
    for (i, h), units in heads.items():
        both = torch.cat([found[i, h, 0], found[i, h, 1]])
        assert both.tolist() == pytest.approx(score_by_hand(units, model.blocks[i].attn.head_proj[h]), rel=1e-6)
    scores = activation_score(mlps(model), grams_of(model, mlps(model), images))
    for i, units in hidden.items():
        assert scores[i,].tolist() == pytest.approx(score_by_hand(units, model.blocks[i].mlp.fc2), rel=1e-6)


def guess(units, stays):
    """Ridge regression of the removed units on the kept ones and 1: coefficients (kept, removed), constants."""
    mean, penalty = units.mean(0), RIDGE * units.var(0).mean() * len(units)
    x, y = units[:, stays] - mean[stays], units[:, ~stays] - mean[~stays]
    x = np.concatenate([x, np.sqrt(penalty) * np.eye(stays.sum())])
    y = np.concatenate([y, np.zeros((stays.sum(), (~stays).sum()))])
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    return coefficients, mean[~stays] - mean[stays] @ coefficients


@RECURRENT
def test_refitted_weights_are_those_of_a_regression_written_out(rep_by):
    model, images = ragged(rep_by), images_of()
    heads, _ = written_out(model, images)
    parts, before = replacements(model), copy.deepcopy(model)
    kept = keep_share(unit_norms(parts), 0.5)
    refit(parts, kept, grams_of(model, parts, images))
    shrink(parts, kept)
    for (i, h), units in heads.items():
        old, new = before.blocks[i].attn, model.blocks[i].attn
        sizes = old.sizes[h]
        stays = [np.isin(np.arange(u), kept[i, h, r].numpy()) for r, u in enumerate(sizes)]
        pieces = np.split(units, [sizes[0]], axis=1)
        read = (old.head_proj[h].weight, old.head_proj[h].bias, new.head_proj[h].weight, new.head_proj[h].bias)
        readers = [(units, np.concatenate(stays), read, slice(None))]
        for r in (0, 1) if old.reads_state else ():
            a, b = old.lstm[h][r], new.lstm[h][r]
            rows = a.by_gate(torch.arange(len(a.bias_hh)))[:, kept[i, h, r]].flatten()
            readers.append((pieces[r], stays[r], (a.weight_hh, a.bias_hh, b.weight_hh, b.bias_hh), rows))
        for values, stay, (w, b, w_new, b_new), row in readers:
            coefficients, constants = guess(values, stay)
            w, b = w.detach().numpy(), b.detach().numpy()
            expected = w[:, stay] + w[:, ~stay] @ coefficients.T
            np.testing.assert_allclose(w_new.detach().numpy(), expected[row], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(b_new.detach().numpy(), (b + w[:, ~stay] @ constants)[row], rtol=1e-6, atol=1e-9)


@RECURRENT
def test_a_unit_that_another_repeats_can_go_once_refitted(rep_by):
    model, images = ragged(rep_by), images_of()
    kept = {place: torch.arange(len(s)) for place, s in unit_norms(replacements(model)).items()}
    with torch.no_grad():
        for block, h, r in ((0, 0, 1), (3, 1, 0)):
            cell = model.blocks[block].attn.lstm[h][r]
            for w in cell.cell():
                cell.by_gate(w)[:, 4] = cell.by_gate(w)[:, 9]  # unit 4's rows are unit 9's: so are its values
            kept[block, h, r] = torch.tensor([j for j in range(32) if j != 4])
        expected, errors = model(images), []
        for mend in (False, True):
            other = copy.deepcopy(model)
            parts = replacements(other)
            if mend:
                refit(parts, kept, grams_of(other, parts, images))
            shrink(parts, kept)
            errors.append(relative_error(other(images), expected))
    assert errors[1] < 0.2 * errors[0]


def test_a_constant_unit_goes_into_the_bias_exactly():
    model, images = ragged(), images_of()
    parts = mlps(model)
    kept = {(i,): torch.arange(part.sizes) for i, part in parts.items()}
    kept[1,] = torch.arange(16)
    with torch.no_grad():
        parts[1].fc1.weight[16], parts[1].fc1.bias[16] = 0, 2.0
        expected = model(images)
        refit(parts, kept, grams_of(model, parts, images[:2]))
        shrink(parts, kept)
        assert parts[1].sizes == 16 and relative_error(model(images), expected) < 1e-10
