"""How much of the teacher's function a student keeps: its answers, and what its blocks compute on the way to them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

from engine.evaluate import ACCURACY, accuracy, batches, score, sums_of
from models.features import Features, forward_features, kl_divergence
from utils.distributed import Context


@torch.no_grad()
def fidelity(
    student: VisionTransformer,
    teacher: VisionTransformer,
    loader: DataLoader,
    context: Context,
    autocast: Callable,
    blocks: Iterable[int] | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Evaluates a student and its teacher in one pass, each on its own running state, over the shares of all processes.

    blocks: those compared inside, of both models' indices; all by default, none for a student whose blocks were fused.
    check: as in `batches`.

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
    training = [(model, model.training) for model in (student, teacher)]
    student.eval(), teacher.eval()
    scores = torch.stack([sums_of(teacher.num_classes, context)] * 2)
    totals = torch.zeros(4 + 3 * len(blocks), dtype=torch.float64, device=context.device)
    for images, targets in batches(loader, context, check):
        with autocast():
            if blocks:
                ours, theirs = (forward_features(model, images, blocks) for model in (student, teacher))
            else:  # a fused student has no blocks to look into
                ours, theirs = (Features(model(images), {}, {}, {}) for model in (student, teacher))
        scores += torch.stack([score(features.logits, targets) for features in (ours, theirs)])
        kl = kl_divergence(ours.logits.float(), theirs.logits.float(), "sum")
        answer = theirs.logits.argmax(1)
        same, wrong = ours.logits.argmax(1) == answer, answer != targets
        sums = [same.sum(), kl, wrong.sum(), (same & wrong).sum()]
        for i in blocks:
            cosine = F.cosine_similarity(ours.z[i].float(), theirs.z[i].float(), dim=-1).mean(1).sum()
            a, b = ours.output[i].double(), theirs.output[i].double()
            sums += [cosine, (a - b).square().sum(), b.square().sum()]
        totals += torch.stack([value.double() for value in sums])
    for model, mode in training:
        model.train(mode)

    student_report, teacher_report = (accuracy(context.sum(sums)) for sums in scores)
    count = student_report["images"]
    agreed, kl, wrong, repeated, *by_block = context.sum(totals).tolist()
    report = {
        **student_report,
        **{f"teacher_{name}": teacher_report[name] for name in ACCURACY},
        "agreement": 100 * agreed / count,
        "kl": max(kl / count, 0.0),  # of equal logits rounding gives a hair less
        "teacher_errors": int(wrong),
        "repeated_errors": int(repeated),
    }
    if blocks:
        cosines, errors, norms = by_block[::3], by_block[1::3], by_block[2::3]
        report["z_similarity"] = {i: cosine / count for i, cosine in zip(blocks, cosines, strict=True)}
        report["output_error"] = {i: (e / n) ** 0.5 for i, e, n in zip(blocks, errors, norms, strict=True)}
    return report


def of_teacher(report: dict[str, Any]) -> dict[str, Any]:
    """The row of the teacher itself, from a comparison with it."""
    accuracies = {name: report[f"teacher_{name}"] for name in ACCURACY}
    same = {"agreement": 100.0, "kl": 0.0, "repeated_errors": report["teacher_errors"]}
    inside = {"z_similarity": dict.fromkeys(report["z_similarity"], 1.0)}
    return {**report, **accuracies, **same, **inside, "output_error": dict.fromkeys(report["output_error"], 0.0)}


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
