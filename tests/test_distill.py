"""Features and losses against values computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.distill import Distillation, forward_features, similarity
from engine.stages import PARTS, Optim, Plan, Stage, distillation, select_trainable, steps
from models.deit import create_teacher
from models.replace import swap_attention

OPTIM = Optim(epochs=1, batch_size=4, lr=1e-3)


def pair():
    teacher = create_teacher("DeiT-Micro", 10, 32).eval()
    student = create_teacher("DeiT-Micro", 10, 32)
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
    x = torch.randn(2, 3, 32, 32)
    for model in (student.eval(), teacher):
        seen = forward_features(model, x, (0, 1, 2, 3))
        torch.testing.assert_close(seen.logits, model(x))
        projection = model.blocks[1].attn.post_proj if model is student else model.blocks[1].attn.proj
        torch.testing.assert_close(projection(seen.z[1]), model.blocks[1].attn(model.blocks[1].norm1(seen.inputs[1])))
        torch.testing.assert_close(seen.output[1], model.blocks[1](seen.inputs[1]))


@pytest.mark.parametrize("source", ["teacher", "student"])
@pytest.mark.parametrize("loss", ["similarity", "classification", "combine"])
def test_losses_are_the_sums_their_names_say(loss, source):
    student, teacher = pair()
    student.eval()
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3])
    value, parts = Distillation(student, teacher, stage(loss), nn.CrossEntropyLoss(), source)(x, y)
    own, theirs = (forward_features(m, x, (1, 2)) for m in (student, teacher))
    expected = {}
    if loss != "classification":
        target = "z" if loss == "similarity" else "output"
        read = own.inputs if source == "student" else theirs.inputs
        total = 0
        for i in (1, 2):
            block = student.blocks[i]
            mine = block.attn.mix(block.norm1(read[i])) if target == "z" else block(read[i])
            total += (1 - F.cosine_similarity(mine, getattr(theirs, target)[i], dim=-1)).mean()
        expected["similarity"] = total
    if loss != "similarity":
        expected["classification"] = F.cross_entropy(student(x), y)
    assert parts.keys() == expected.keys()
    for name in parts:
        torch.testing.assert_close(parts[name], expected[name].detach())
    torch.testing.assert_close(value, sum(expected.values()))


def test_the_teacher_stays_frozen_and_in_eval_mode():
    student, teacher = pair()
    task = Distillation(student, teacher, stage("combine"), nn.CrossEntropyLoss()).train()
    select_trainable(student, task.stage)
    task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))[0].backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("parts", sorted(PARTS))
def test_only_the_named_parts_get_gradients(parts):
    student, teacher = pair()
    s = stage("classification", parts=parts)
    count = select_trainable(student, s)
    Distillation(student, teacher, s, nn.CrossEntropyLoss())(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))[
        0
    ].backward()
    got = {name for name, p in student.named_parameters() if p.grad is not None}
    attn = {f"blocks.{i}.attn." for i in (1, 2)}
    belongs = {
        "mixing": lambda n: any(n.startswith(a) and "post_proj" not in n for a in attn),
        "block": lambda n: n.startswith(("blocks.1.", "blocks.2.")),
        "FC": lambda n: n.startswith(("blocks.1.mlp", "blocks.2.mlp")),
        "FC+head": lambda n: n.startswith(("blocks.1.mlp", "blocks.2.mlp", "head.")),
        "head": lambda n: n.startswith("head."),
        "full": lambda n: True,
    }[parts]
    assert got == {name for name, _ in student.named_parameters() if belongs(name)}
    assert count == sum(p.numel() for n, p in student.named_parameters() if n in got)


def test_sequential_steps_go_front_to_back_and_swap_as_they_go():
    assert steps((0, 1, 2, 3, 4), "sequential", 2) == [(0, 1), (2, 3), (4,)]
    assert steps((0, 1), "parallel", 1) == [(0, 1)]
    plan = distillation((0, 1, 2), Plan(step=2, finetune_head=True), OPTIM, OPTIM)
    assert [(s.name, s.swapped, s.blocks) for s in plan] == [
        ("attn 1/2", (0, 1), (0, 1)),
        ("attn 2/2", (0, 1, 2), (2,)),
        ("block 1/2", (0, 1, 2), (0, 1)),
        ("block 2/2", (0, 1, 2), (2,)),
        ("head", (0, 1, 2), (0, 1, 2)),
    ]
