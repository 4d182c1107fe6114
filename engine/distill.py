"""Teacher and student side by side: their features, and the losses between them (arXiv 2505.21535, section 3)."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.stages import PARTS, Stage
from models.features import forward_blocks, forward_features
from utils.errors import FarError
from utils.names import loss_terms


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over B and N of 1 - cos(a, b) for token maps (B, N, C): 0 is equal in direction, 2 opposite."""
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).mean()


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over B of |a - b|^2 / |b|^2, norms over N and C, for token maps (B, N, C): 0 is equal, in length too."""
    a, b = a.float().flatten(1), b.float().flatten(1)
    return ((a - b).square().sum(1) / b.square().sum(1).clamp_min(torch.finfo(b.dtype).tiny)).mean()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over B of KL(teacher || student) in nats, for logits (B, classes): 0 is the same answer, as surely given."""
    log_ours, log_theirs = student.float().log_softmax(1), teacher.float().log_softmax(1)
    return F.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True)


Parts = dict[str, Tensor]


class View(NamedTuple):
    """What the terms of a loss read; what none of a loss's terms reads is None."""

    maps: dict[int, Tensor] | None  # the student's, by block: what the stage compares
    goals: dict[int, Tensor] | None  # the teacher's
    logits: Tensor | None  # (B, classes), the student's on its own running state
    answers: Tensor | None  # (B, classes), the teacher's logits
    labels: Tensor
    criterion: nn.Module  # (logits, labels) to a scalar


def _over_blocks(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[View], Tensor]:
    """The sum over blocks of a distance between the student's map and the teacher's."""
    return lambda view: torch.stack([distance(view.maps[i], view.goals[i].detach()) for i in view.maps]).sum()


class Term(NamedTuple):
    """A summand of a loss: from a view to a scalar, reading these of its fields."""

    value: Callable[[View], Tensor]
    reads: frozenset[str]


TEMPERATURE = (
    4.0  # divides logits in soft_kl: the teacher is nearly certain, and what it thinks of other classes counts
)


def soft_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """`divergence` at TEMPERATURE, times its square, so that gradients stay as large (Hinton et al., 2015)."""
    return TEMPERATURE**2 * divergence(student / TEMPERATURE, teacher / TEMPERATURE)


MAPS, LOGITS = frozenset({"maps", "goals"}), frozenset({"logits"})
TERMS = {
    "similarity": Term(_over_blocks(similarity), MAPS),
    "squared_error": Term(_over_blocks(squared_error), MAPS),
    "kl": Term(lambda view: divergence(view.logits, view.answers), LOGITS | {"answers"}),
    "soft_kl": Term(lambda view: soft_divergence(view.logits, view.answers), LOGITS | {"answers"}),
    "classification": Term(lambda view: view.criterion(view.logits.float(), view.labels), LOGITS | {"labels"}),
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


def check_reach(stages: Iterable[Stage]) -> None:
    """Raises FarError where a stage would train what its loss does not reach."""
    for stage in stages:
        if PARTS[stage.parts].behind and "logits" not in find_loss(stage.loss).reads:
            useful = " or ".join(name for name, loss in LOSSES.items() if "logits" in loss.reads)
            raise FarError(
                f"stage {stage.name}: trains {stage.parts}, but the loss {stage.loss} does not reach the classifier; "
                f"take {useful} for it, or leave the classifier out (--block-ft-mode)"
            )


class Distillation(nn.Module):
    """Runs teacher and student and returns the stage's loss, so that DistributedDataParallel sees its own forward.

    Args:
        student: the model that trains.
        teacher: frozen attention model, or None where no loss needs it.
        stage: which loss, on which blocks.
        criterion: (logits, targets) to a scalar.
        distill_input: `teacher`: a student block reads the teacher's input to that block; `student`: the running state.

    forward(images (B, 3, S, S), targets) returns (loss, its parts as detached scalars), looked at or not.
    """

    def __init__(self, student, teacher, stage: Stage, criterion: nn.Module, distill_input: str = "student"):
        super().__init__()
        self.student, self.loss, self.stage = student, find_loss(stage.loss), stage
        self.teacher = teacher if self.loss.reads & {"goals", "answers"} else None
        self.criterion, self.distill_input = criterion, distill_input
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor, looked_at: bool = True) -> tuple[Tensor, Parts]:
        view = self._view(images, targets)
        parts = {name: TERMS[name].value(view) for name in self.loss.terms}
        loss = sum(weight * parts[name] for name, weight in self.loss.terms.items())
        return loss, {name: part.detach() for name, part in parts.items()}

    def _view(self, images: Tensor, targets: Tensor) -> View:
        """Both models run as far as the loss reads: up to the stage's last block, or to the logits."""
        reads = self.loss.reads
        blocks = self.stage.blocks if "maps" in reads else ()
        own = teacher = seen = None
        if "logits" in reads or self.distill_input == "student":
            own = forward_features(self.student, images, blocks, "logits" in reads)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = forward_features(self.teacher, images, blocks, "answers" in reads)
            seen = own if self.distill_input == "student" else forward_blocks(self.student, teacher.inputs)
        compares = self.loss.compares or self.stage.target
        maps, goals = (getattr(features, compares, None) for features in (seen, teacher))
        return View(
            maps, goals, getattr(own, "logits", None), getattr(teacher, "logits", None), targets, self.criterion
        )
