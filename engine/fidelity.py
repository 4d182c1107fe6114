"""How much of the teacher's function a student keeps: its answers, and what its blocks compute on the way to them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader

from engine.evaluate import accuracy, batches, score, sums_of
from models.features import Features, forward_features
from utils.distributed import Context

OF_BOTH = ("loss", "acc1", "acc5", "balanced_acc1")


@torch.no_grad()
def fidelity(
    student: VisionTransformer,
    teacher: VisionTransformer,
    loader: DataLoader,
    context: Context,
    autocast: Callable,
    blocks: Iterable[int] | None = None,
) -> dict[str, Any]:
    """Evaluates a student and its teacher in one pass, each on its own running state, over the shares of all processes.

    blocks: those compared inside, of both models' indices; all by default, none for a student whose blocks were fused.

    Returns a dictionary with
        loss, acc1, acc5, balanced_acc1, images: the student's, as `evaluate` has them; and the same of the teacher but
            for images, teacher_loss and so on.
        agreement: the share of images on which both name the same class, in percent.
        kl: KL(teacher || student) of the logits in nats, mean over images.
        teacher_errors, repeated_errors: how many images the teacher gets wrong, and on how many of those the student
            gives the teacher's wrong answer.
        z_similarity: by block, the cosine similarity of z (joined head outputs before the output projection), mean
            over images and tokens.
        output_error: by block, |student - teacher| / |teacher| of the block's output, norms over all images.
    """
    blocks = range(len(student.blocks)) if blocks is None else tuple(blocks)
    modes = [(model, model.training) for model in (student, teacher)]
    student.eval(), teacher.eval()
    scores = torch.stack([sums_of(teacher.num_classes, context)] * 2)
    totals = torch.zeros(4 + 3 * len(blocks), dtype=torch.float64, device=context.device)
    for images, targets in batches(loader, context):
        with autocast():
            ours, theirs = (_features(model, images, blocks) for model in (student, teacher))
        scores += torch.stack([score(features.logits, targets) for features in (ours, theirs)])
        sums = [*_answers(ours.logits, theirs.logits, targets), *_insides(ours, theirs, blocks)]
        totals += torch.stack([value.double() for value in sums])
    for model, training in modes:
        model.train(training)
    own, reference = (accuracy(context.sum(sums)) for sums in scores)
    insides = _report(context.sum(totals).tolist(), own["images"], blocks)
    return {**own, **{f"teacher_{name}": reference[name] for name in OF_BOTH}, **insides}


def _features(model: VisionTransformer, images: Tensor, blocks: Iterable[int]) -> Features:
    """Without blocks to look at, the model's own forward: a fused one has no other."""
    return forward_features(model, images, blocks) if blocks else Features(model(images), {}, {}, {})


def _answers(ours: Tensor, theirs: Tensor, targets: Tensor) -> list[Tensor]:
    """Sums over a batch of logits (B, classes): same class, KL, the teacher's errors, those that are repeated."""
    log_ours, log_theirs = ours.float().log_softmax(1), theirs.float().log_softmax(1)
    kl = F.kl_div(log_ours, log_theirs, reduction="sum", log_target=True)
    same, wrong = ours.argmax(1) == theirs.argmax(1), theirs.argmax(1) != targets
    return [same.sum(), kl, wrong.sum(), (same & wrong).sum()]


def _insides(ours: Features, theirs: Features, blocks: Iterable[int]) -> list[Tensor]:
    """Sums over a batch, block by block: cosine of z, squared norms of the outputs' difference and of the teacher's."""
    sums = []
    for i in blocks:
        cosine = F.cosine_similarity(ours.z[i].float(), theirs.z[i].float(), dim=-1).mean(1).sum()
        a, b = ours.output[i].double(), theirs.output[i].double()
        sums += [cosine, (a - b).square().sum(), b.square().sum()]
    return sums


def _report(totals: list[float], count: int, blocks: Iterable[int]) -> dict[str, Any]:
    same, kl, wrong, repeated, *insides = totals
    by_block = list(zip(insides[::3], insides[1::3], insides[2::3], strict=True))
    report = {
        "agreement": 100 * same / count,
        "kl": max(kl / count, 0.0),  # of equal logits rounding gives a hair less
        "teacher_errors": int(wrong),
        "repeated_errors": int(repeated),
    }
    if blocks:
        report["z_similarity"] = {i: c / count for i, (c, _, _) in zip(blocks, by_block, strict=True)}
        report["output_error"] = {i: (e / s) ** 0.5 for i, (_, e, s) in zip(blocks, by_block, strict=True)}
    return report


def of_teacher(report: dict[str, Any]) -> dict[str, Any]:
    """The row of the teacher itself, from a comparison with it."""
    own = {name: report[f"teacher_{name}"] for name in OF_BOTH}
    same = {"agreement": 100.0, "kl": 0.0, "repeated_errors": report["teacher_errors"]}
    inside = {"z_similarity": dict.fromkeys(report["z_similarity"], 1.0)}
    return {**report, **own, **same, **inside, "output_error": dict.fromkeys(report["output_error"], 0.0)}


def farthest(report: dict[str, Any]) -> dict[str, float]:
    """The least cosine of z and the largest output error of all blocks; nothing where no block was looked at."""
    if "z_similarity" not in report:
        return {}
    return {"least_z": min(report["z_similarity"].values()), "most_error": max(report["output_error"].values())}


def summary(report: dict[str, Any]) -> str:
    """The report in one line; of its blocks the farthest from the teacher's."""
    inside = farthest(report)
    far = (
        ", z's cosine at least {least_z:.2f}, output error at most {most_error:.2f}".format(**inside) if inside else ""
    )
    return (
        f"agrees with its teacher on {report['agreement']:.2f} %, KL {report['kl']:.4f}, repeats "
        f"{report['repeated_errors']} of its {report['teacher_errors']} errors{far}"
    )
