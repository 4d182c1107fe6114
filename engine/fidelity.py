"""How much of the teacher's function a student keeps: its answers, and what its blocks compute on the way to them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.loading import naming_dead_workers
from engine.distill import Features, forward_features
from utils.distributed import Context


@torch.no_grad()
def fidelity(
    student: VisionTransformer,
    teacher: VisionTransformer,
    loader: DataLoader,
    context: Context,
    autocast: Callable,
    blocks: Iterable[int] | None = None,
) -> dict[str, Any]:
    """Compares a student with its teacher, each on its own running state, over the shares of all processes.

    blocks: those compared inside, of both models' indices; all by default, none for a student whose blocks were fused.

    Returns a dictionary with
        agreement: the share of images on which both name the same class, in percent.
        kl: KL(teacher || student) of the logits in nats, mean over images.
        teacher_acc1: the teacher's own top-1 in percent.
        teacher_errors, repeated_errors: how many images the teacher gets wrong, and on how many of those the student
            gives the teacher's wrong answer.
        z_similarity: by block, the cosine similarity of z (joined head outputs before the output projection), mean
            over images and tokens.
        output_error: by block, |student - teacher| / |teacher| of the block's output, norms over all images.
    """
    blocks = range(len(student.blocks)) if blocks is None else tuple(blocks)
    modes = [(model, model.training) for model in (student, teacher)]
    student.eval(), teacher.eval()
    totals = torch.zeros(5 + 3 * len(blocks), dtype=torch.float64, device=context.device)
    with naming_dead_workers(loader.num_workers):
        for images, targets in loader:
            images, targets = images.to(context.device), targets.to(context.device)
            with autocast():
                ours, theirs = (_features(model, images, blocks) for model in (student, teacher))
            sums = [*_answers(ours.logits, theirs.logits, targets), *_insides(ours, theirs, blocks)]
            totals += torch.stack([totals.new_tensor(len(images)), *(value.double() for value in sums)])
    for model, training in modes:
        model.train(training)
    return _report(context.sum(totals).tolist(), blocks)


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


def _report(totals: list[float], blocks: Iterable[int]) -> dict[str, Any]:
    count, same, kl, wrong, repeated, *insides = totals
    by_block = list(zip(insides[::3], insides[1::3], insides[2::3], strict=True))
    report = {
        "agreement": 100 * same / count,
        "kl": max(kl / count, 0.0),  # of equal logits rounding gives a hair less
        "teacher_acc1": 100 * (count - wrong) / count,
        "teacher_errors": int(wrong),
        "repeated_errors": int(repeated),
    }
    if blocks:
        report["z_similarity"] = {i: c / count for i, (c, _, _) in zip(blocks, by_block, strict=True)}
        report["output_error"] = {i: (e / s) ** 0.5 for i, (_, e, s) in zip(blocks, by_block, strict=True)}
    return report


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
