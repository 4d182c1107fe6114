"""Exact evaluation: each image counts once, whatever the number of processes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.loading import naming_dead_workers
from utils.distributed import Context


def batches(loader: DataLoader, context: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches (images, targets) on its device, behind a progress bar of rank 0."""
    device, hidden = context.device, None if context.main else True  # None: hidden unless a terminal shows it
    with naming_dead_workers(loader.num_workers):
        for images, targets in tqdm(loader, desc="evaluation", unit="batch", leave=False, disable=hidden):
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch, in float64: (cross entropy, right answers, right among the first five, images)."""
    logits = logits.float()
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(targets[:, None])  # (B, 5)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    sums = [loss.double(), top[:, 0].sum().double(), top.sum().double()]
    return torch.stack([*sums, sums[0].new_tensor(len(targets))])


def accuracy(sums: list[float]) -> dict[str, float]:
    """Means of `score` over all images: loss, acc1 and acc5 in percent, images (the count)."""
    loss, top1, top5, images = sums
    return {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "images": int(images)}


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, context: Context, autocast, check: Callable[[], None] | None = None
) -> dict[str, float]:
    """`accuracy` of a model over the shares of all processes.

    check: called between batches, by all processes equally often; it may raise to end the evaluation.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=context.device)
    common = -context.most(-len(loader)) if check else 0  # shares differ by an image, and so by a batch
    for number, (images, targets) in enumerate(batches(loader, context)):
        if number < common:
            check()
        with autocast():
            logits = model(images)
        totals += score(logits, targets)
    model.train(training)
    return accuracy(context.sum(totals).tolist())
