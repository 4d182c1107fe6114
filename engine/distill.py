"""Teacher and student side by side: their features, and the losses between them (arXiv 2505.21535, section 3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.stages import Stage
from models.features import forward_blocks, forward_features, kl_divergence
from utils.names import loss_terms


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over B and N of 1 - cos(a, b) for token maps (B, N, C): 0 is equal in direction, 2 opposite."""
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).mean()


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over B of |a - b|^2 / |b|^2, norms over N and C, for token maps (B, N, C): 0 is equal, in length too."""
    a, b = a.float().flatten(1), b.float().flatten(1)
    return ((a - b).square().sum(1) / b.square().sum(1).clamp_min(torch.finfo(b.dtype).tiny)).mean()


class View(NamedTuple):
    """What the terms of a loss read; None where no term of the loss reads it."""

    student_features: dict[int, Tensor] | None  # by block, (B, N, D): z or the block's output, as the stage compares
    teacher_features: dict[int, Tensor] | None
    student_logits: Tensor | None  # (B, classes), on the student's own running state
    teacher_logits: Tensor | None  # (B, classes)
    labels: Tensor
    criterion: nn.Module  # (logits, labels) to a scalar


class Term(NamedTuple):
    """A summand of a loss: from a view to a scalar, reading these of its fields."""

    value: Callable[[View], Tensor]
    reads: frozenset[str]


def over_blocks(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[View], Tensor]:
    """The sum over blocks of a distance between the student's features and the teacher's."""

    def total(view: View) -> Tensor:
        student, teacher = view.student_features, view.teacher_features
        return torch.stack([distance(student[i], teacher[i].detach()) for i in student]).sum()

    return total


TEMPERATURE = 4.0  # of soft_kl: it makes what the teacher thinks of the other classes count


def divergence(view: View, temperature: float = 1.0) -> Tensor:
    """Mean KL at a temperature, times its square, so that gradients stay as large (Hinton et al., 2015)."""
    student, teacher = view.student_logits / temperature, view.teacher_logits / temperature
    return temperature**2 * kl_divergence(student.float(), teacher.float())


FEATURES = frozenset({"student_features", "teacher_features"})
LOGITS = frozenset({"student_logits", "teacher_logits"})
TERMS = {
    "similarity": Term(over_blocks(similarity), FEATURES),
    "squared_error": Term(over_blocks(squared_error), FEATURES),
    "kl": Term(divergence, LOGITS),
    "soft_kl": Term(lambda view: divergence(view, TEMPERATURE), LOGITS),
    "classification": Term(
        lambda view: view.criterion(view.student_logits.float(), view.labels), frozenset({"student_logits", "labels"})
    ),
}


class Loss(NamedTuple):
    """A loss by name: the weights of its terms, and the map it compares where that is not what the stage targets."""

    terms: dict[str, float]
    compares: str = ""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(TERMS[name].reads for name in self.terms))


# `combine` compares block outputs in every stage; the others compare what the stage targets. Only the last reads no
# label and yet reaches the classifier.
LOSSES = {
    "similarity": Loss({"similarity": 1.0}),
    "classification": Loss({"classification": 1.0}),
    "combine": Loss({"similarity": 1.0, "classification": 1.0}, compares="output"),
    "preserve": Loss({"similarity": 1.0, "squared_error": 1.0, "kl": 1.0}),
}


def find_loss(text: str) -> Loss:
    """By its name, or from its terms, `similarity+0.5*kl`."""
    return LOSSES.get(text) or Loss(loss_terms(text))


class Distillation(nn.Module):
    """Runs teacher and student and returns the stage's loss, so that DistributedDataParallel sees its own forward.

    Args:
        student: the model that trains.
        stage: which loss, on which blocks.
        criterion: (logits, targets) to a scalar.
        teacher: frozen attention model, or None where no loss needs it.
        distill_input: `teacher`: a student block reads the teacher's input to that block; `student`: the running state.

    forward(images (B, 3, S, S), targets) returns (loss, its terms as detached scalars). It runs both models as far as
    the loss reads: up to the stage's last block, or to the logits.
    """

    def __init__(self, student, stage: Stage, criterion: nn.Module, teacher=None, distill_input: str = "student"):
        super().__init__()
        self.student, self.loss, self.stage = student, find_loss(stage.loss), stage
        self.teacher = teacher if self.loss.reads & {"teacher_features", "teacher_logits"} else None
        self.criterion, self.distill_input = criterion, distill_input
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        reads, student, teacher, compared = self.loss.reads, None, None, None
        blocks = self.stage.blocks if "student_features" in reads else ()
        if "student_logits" in reads or self.distill_input == "student":
            student = forward_features(self.student, images, blocks, "student_logits" in reads)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = forward_features(self.teacher, images, blocks, "teacher_logits" in reads)
            # What is compared: the blocks on the running state, or each block on the teacher's input to it.
            compared = student if self.distill_input == "student" else forward_blocks(self.student, teacher.inputs)
        field = self.loss.compares or self.stage.target
        view = View(
            student_features=getattr(compared, field, None),
            teacher_features=getattr(teacher, field, None),
            student_logits=getattr(student, "logits", None),
            teacher_logits=getattr(teacher, "logits", None),
            labels=targets,
            criterion=self.criterion,
        )
        terms = {name: TERMS[name].value(view) for name in self.loss.terms}
        loss = sum(weight * terms[name] for name, weight in self.loss.terms.items())
        return loss, {name: term.detach() for name, term in terms.items()}
