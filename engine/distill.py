"""Teacher and student side by side: their features, and the losses between them (arXiv 2505.21535, section 3)."""

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from engine.stages import PARTS, Stage
from utils.errors import FarError


class Features(NamedTuple):
    """What a forward pass leaves behind. Maps are (B, N, D), by block index."""

    logits: Tensor | None
    inputs: dict[int, Tensor]
    z: dict[int, Tensor]  # joined head outputs before the output projection
    output: dict[int, Tensor]


@contextlib.contextmanager
def recorded_z(model: VisionTransformer, blocks: Iterable[int]):
    """Collects z of the named blocks: it is what enters their output projection, for attention and LSTM alike."""
    z: dict[int, Tensor] = {}
    handles = [
        model.blocks[i].attn.proj.register_forward_pre_hook(lambda _, args, i=i: z.__setitem__(i, args[0]))
        for i in blocks
    ]
    try:
        yield z
    finally:
        for handle in handles:
            handle.remove()


def forward_features(model: VisionTransformer, images: Tensor, blocks: Iterable[int]) -> Features:
    """A whole forward pass, keeping inputs, z and outputs of the named blocks."""
    blocks, inputs, output = set(blocks), {}, {}
    with recorded_z(model, blocks) as z:
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))  # (B, N, D)
        for i, block in enumerate(model.blocks):
            if i in blocks:
                inputs[i] = x
            x = block(x)
            if i in blocks:
                output[i] = x
        logits = model.forward_head(model.norm(x))
    return Features(logits, inputs, z, output)


def forward_blocks(model: VisionTransformer, inputs: dict[int, Tensor]) -> Features:
    """Each block on an input of its own, independent of the others."""
    with recorded_z(model, inputs) as z:
        output = {i: model.blocks[i](x) for i, x in inputs.items()}
    return Features(None, inputs, z, output)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over B and N of 1 - cos(a, b) for token maps (B, N, C): 0 is equal in direction, 2 opposite."""
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).mean()


def _sum_similarity(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
    return torch.stack([similarity(student[i], teacher[i].detach()) for i in student]).sum()


Parts = dict[str, Tensor]


class LossKind(NamedTuple):
    """A loss by name: does it read features, does it read the student's logits, which map the features are."""

    features: bool
    logits: bool
    always_output: bool = False


# `combine` compares block outputs in every stage; `similarity` compares what the stage targets.
LOSSES = {
    "similarity": LossKind(True, False),
    "classification": LossKind(False, True),
    "combine": LossKind(True, True, always_output=True),
}


def check_reach(stages: Iterable[Stage]) -> None:
    """Raises FarError where a stage would train what its loss does not reach."""
    for stage in stages:
        if PARTS[stage.parts].behind and not LOSSES[stage.loss].logits:
            useful = " or ".join(name for name, kind in LOSSES.items() if kind.logits)
            raise FarError(
                f"stage {stage.name}: trains {stage.parts}, but the loss {stage.loss} does not reach the classifier; "
                f"take {useful} for it (--block-ft-train-loss), or leave the classifier out (--block-ft-mode)"
            )


class Distillation(nn.Module):
    """Runs teacher and student and returns the stage's loss, so that DistributedDataParallel sees its own forward.

    Args:
        student: the model that trains.
        teacher: frozen attention model, or None where no loss needs it.
        stage: which loss, on which blocks.
        criterion: (logits, targets) to a scalar.
        distill_input: `teacher`: a student block reads the teacher's input to that block; `student`: the running state.

    forward(images (B, 3, S, S), targets) returns (loss, its parts as detached scalars).
    """

    def __init__(self, student, teacher, stage: Stage, criterion: nn.Module, distill_input: str = "student"):
        super().__init__()
        self.student, self.kind, self.stage = student, LOSSES[stage.loss], stage
        self.teacher = teacher if self.kind.features else None
        self.criterion, self.distill_input = criterion, distill_input
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Parts]:
        blocks, parts, own = self.stage.blocks, {}, None
        if self.kind.logits or self.distill_input == "student":
            own = forward_features(self.student, images, blocks)
        if self.kind.features:
            with torch.no_grad():
                teacher = forward_features(self.teacher, images, blocks)
            seen = own if self.distill_input == "student" else forward_blocks(self.student, teacher.inputs)
            target = "output" if self.kind.always_output else self.stage.target
            parts["similarity"] = _sum_similarity(getattr(seen, target), getattr(teacher, target))
        if self.kind.logits:
            parts["classification"] = self.criterion(own.logits.float(), targets)
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def mean_similarity_of_z(student, teacher, loader, blocks: Iterable[int], context) -> dict[int, float]:
    """Mean cosine similarity of z between student and teacher, each on its own running state, by block."""
    blocks = tuple(blocks)
    student.eval(), teacher.eval()
    totals = torch.zeros(len(blocks) + 1, dtype=torch.float64, device=context.device)
    for images, _ in loader:
        images = images.to(context.device)
        ours, theirs = (forward_features(m, images, blocks).z for m in (student, teacher))
        cos = [F.cosine_similarity(ours[i], theirs[i], dim=-1).mean(1).sum().double() for i in blocks]
        totals += torch.stack([*cos, totals.new_tensor(len(images))])
    *sums, count = context.sum(totals).tolist()
    return {i: s / count for i, s in zip(blocks, sums, strict=True)}
