"""Features and losses against values computed by hand."""

import re

import pytest
import torch
from torch import nn

from engine.distill import Distillation, similarity
from engine.stages import PARTS, Stage, distillation, select_trainable
from models.deit import create_teacher
from models.features import forward_features
from models.replace import swap_attention
from utils.configs import Optim, Plan

OPTIM = Optim(epochs=1, batch_size=4, lr=1e-3)


def pair():
    teacher = create_teacher("DeiT-Micro", 10, 16).eval()
    student = create_teacher("DeiT-Micro", 10, 16)
    student.load_state_dict(teacher.state_dict())
    swap_attention(student, (1, 2), "multi-lstm")
    return student, teacher


def stage(loss, target="z", parts="mixing", blocks=(1, 2)):
    return Stage("s", blocks, blocks, parts, loss, target, OPTIM)


def test_similarity_is_a_mean_over_tokens_of_one_minus_cosine():
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    by_hand = sum(1 - (x @ y) / (x.norm() * y.norm()) for x, y in zip(a.view(-1, 8), b.view(-1, 8), strict=True)) / 10
    torch.testing.assert_close(similarity(a, b), by_hand)
    assert similarity(a, 3 * a).abs() < 1e-6


def test_features_are_those_of_an_ordinary_forward_and_z_precedes_the_projection():
    student, teacher = pair()
    x = torch.randn(2, 3, 16, 16)
    for model in (student.eval(), teacher):
        seen = forward_features(model, x, (0, 1, 2, 3))
        torch.testing.assert_close(seen.logits, model(x))
        projection = model.blocks[1].attn.post_proj if model is student else model.blocks[1].attn.proj
        torch.testing.assert_close(projection(seen.z[1]), model.blocks[1].attn(model.blocks[1].norm1(seen.inputs[1])))
        torch.testing.assert_close(seen.output[1], model.blocks[1](seen.inputs[1]))


def by_hand(name, ours, theirs, logits, answers, labels):
    """A term of a loss over images, tokens and classes one by one, in float64."""
    p, q = answers.double().softmax(1), logits.double().softmax(1)
    if name == "classification":
        return -sum(q[n, label].log() for n, label in enumerate(labels)) / len(q)
    if name == "kl":
        return sum(p[n, c] * (p[n, c] / q[n, c]).log() for n in range(len(p)) for c in range(p.shape[1])) / len(p)
    if name == "soft_kl":
        return 16 * by_hand("kl", ours, theirs, logits / 4, answers / 4, labels)
    total = 0
    for i in ours:
        a, b = ours[i].detach().double(), theirs[i].double()
        if name == "similarity":
            tokens = list(zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
            total += 1 - sum(x @ y / x.norm() / y.norm() for x, y in tokens) / len(tokens)
        else:
            total += sum((x - y).norm() ** 2 / y.norm() ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    return total


LOSSES = {
    "similarity": {"similarity": 1},
    "classification": {"classification": 1},
    "combine": {"similarity": 1, "classification": 1},
    "preserve": {"similarity": 1, "squared_error": 1, "kl": 1},
    "kl": {"kl": 1},
    "soft_kl": {"soft_kl": 1},
    "0.25*squared_error+30*kl": {"squared_error": 0.25, "kl": 30},
}


@pytest.mark.parametrize("source", ["teacher", "student"])
@pytest.mark.parametrize("target", ["z", "output"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_sums_their_names_say(loss, target, source):
    student, teacher = pair()
    student.eval()
    with torch.no_grad():
        student.head.bias.normal_()  # else both give nearly the same answers
    x, y = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    value, parts = Distillation(student, stage(loss, target), nn.CrossEntropyLoss(), teacher, source)(x, y)
    own, theirs = (forward_features(m, x, (1, 2)) for m in (student, teacher))
    compared = "output" if loss == "combine" else target
    read, ours = own.inputs if source == "student" else theirs.inputs, {}
    for i in (1, 2):
        block = student.blocks[i]
        ours[i] = block.attn.mix(block.norm1(read[i])) if compared == "z" else block(read[i])
    maps = ours, getattr(theirs, compared)
    expected = {name: by_hand(name, *maps, student(x), teacher(x), y.tolist()).item() for name in LOSSES[loss]}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert value.item() == pytest.approx(sum(w * expected[name] for name, w in LOSSES[loss].items()), rel=1e-3)


DEPTHS = {  # by loss: how often each of the student's and of the teacher's blocks runs where blocks 0 and 1 train
    "similarity": ([1, 1, 0, 0], [1, 1, 0, 0]),
    "kl": ([1, 1, 1, 1], [1, 1, 1, 1]),
    "similarity+classification": ([1, 1, 1, 1], [1, 1, 0, 0]),
    "classification": ([1, 1, 1, 1], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("loss", DEPTHS)
def test_both_models_run_once_and_no_deeper_than_the_loss_reads(loss):
    student, teacher = pair()
    counts = []
    for model in (student, teacher):
        seen = [0] * len(model.blocks)
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, seen=seen: seen.__setitem__(i, seen[i] + 1))
        counts.append(seen)
    task = Distillation(student, stage(loss, blocks=(0, 1)), nn.CrossEntropyLoss(), teacher).train()
    task(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    assert tuple(counts) == DEPTHS[loss]


@pytest.mark.parametrize("parts", sorted(PARTS))
def test_only_the_named_parts_get_gradients_and_the_teacher_none(parts):
    student, teacher = pair()
    trained = stage("combine", parts=parts)
    count = select_trainable(student, trained)
    task = Distillation(student, trained, nn.CrossEntropyLoss(), teacher).train()
    task(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))[0].backward()
    got = {name for name, p in student.named_parameters() if p.grad is not None}
    pattern = {
        "mixing": r"blocks\.[12]\.attn\.(?!post_proj)",
        "block": r"blocks\.[12]\.",
        "FC": r"blocks\.[12]\.mlp\.",
        "FC+head": r"blocks\.[12]\.mlp\.|head\.",
        "head": r"head\.",
        "full": "",
    }[parts]
    assert got == {name for name, _ in student.named_parameters() if re.match(pattern, name)}
    assert count == sum(p.numel() for n, p in student.named_parameters() if n in got)
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_sequential_steps_go_front_to_back_and_swap_as_they_go():
    assert [s.blocks for s in distillation((0, 1, 2, 3, 4), Plan(step=2), None, OPTIM)] == [(0, 1), (2, 3), (4,)]
    assert [s.blocks for s in distillation((0, 1), Plan(step=1, train_mode="parallel"), None, OPTIM)] == [(0, 1)]
    plan = distillation((0, 1, 2), Plan(step=2, finetune_head=True), OPTIM, OPTIM)
    assert [(s.name, s.swapped, s.blocks) for s in plan] == [
        ("attn 1/2", (0, 1), (0, 1)),
        ("attn 2/2", (0, 1, 2), (2,)),
        ("block 1/2", (0, 1, 2), (0, 1)),
        ("block 2/2", (0, 1, 2), (2,)),
        ("head", (0, 1, 2), (0, 1, 2)),
    ]
