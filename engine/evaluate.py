"""Exact evaluation: each image counts once, whatever the number of processes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.loading import naming_dead_workers
from utils.distributed import Context


def batches(
    loader: DataLoader, context: Context, check: Callable[[], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches (images, targets) on its device, behind a progress bar of rank 0.

    check: called before each batch, by all processes equally often; it may raise to end the evaluation.
    """
    device, hidden = context.device, None if context.main else True  # None: hidden unless a terminal shows it
    common = -context.most(-len(loader)) if check else 0  # shares differ by an image, and so by a batch
    with naming_dead_workers(loader.num_workers):
        bar = tqdm(loader, desc="evaluation", unit="batch", leave=False, disable=hidden)
        for number, (images, targets) in enumerate(bar):
            if number < common:
                check()
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


ACCURACY = ("loss", "acc1", "acc5", "balanced_acc1")  # of what `accuracy` returns, what a teacher has too


def sums_of(classes: int, context: Context) -> Tensor:
    """Where the batches' `score` is added up."""
    return torch.zeros(2 + 2 * classes, dtype=torch.float64, device=context.device)


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch of logits (B, C), in float64: cross entropy, right among the first five, then by class the
    images and those named right, 2 + 2 C in all."""
    logits = logits.float()
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(targets[:, None])  # (B, 5)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    images = F.one_hot(targets, logits.shape[1])  # (B, C)
    sums = torch.stack([loss.double(), top.sum().double()])
    return torch.cat([sums, images.sum(0).double(), (images * top[:, :1]).sum(0).double()])


def accuracy(sums: Tensor) -> dict[str, float]:
    """Means of `score` over all images: loss; acc1, acc5 and balanced_acc1 in percent; images (the count).

    balanced_acc1: the mean over classes, those that have images, of the share of theirs that is named right.
    """
    (loss, top5), (of_class, right) = sums[:2].tolist(), sums[2:].view(2, -1)
    images, seen = int(of_class.sum()), of_class > 0
    return {
        "loss": loss / images,
        "acc1": 100 * right.sum().item() / images,
        "acc5": 100 * top5 / images,
        "balanced_acc1": 100 * (right[seen] / of_class[seen]).mean().item(),
        "images": images,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, context: Context, autocast, check: Callable[[], None] | None = None
) -> dict[str, float]:
    """`accuracy` of a model over the shares of all processes; check as in `batches`."""
    training = model.training
    model.eval()
    totals = sums_of(model.num_classes, context)
    for images, targets in batches(loader, context, check):
        with autocast():
            logits = model(images)
        totals += score(logits, targets)
    model.train(training)
    return accuracy(context.sum(totals))
