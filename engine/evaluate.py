"""Exact evaluation: each image counts once, whatever the number of processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from datasets.loading import naming_dead_workers
from utils.distributed import Context


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, context: Context, autocast, check: Callable[[], None] | None = None
) -> dict[str, float]:
    """Cross entropy and top-1 / top-5 accuracy in percent, over the shares of all processes.

    check: called between batches, by all processes equally often; it may raise to end the evaluation.

    Returns a dictionary with loss, acc1, acc5 and images (the count).
    """
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=context.device)
    common = -context.most(-len(loader)) if check else 0  # shares differ by an image, and so by a batch
    with naming_dead_workers(loader.num_workers):
        for number, (images, targets) in enumerate(loader):
            if number < common:
                check()
            images, targets = (
                images.to(context.device, non_blocking=True),
                targets.to(context.device, non_blocking=True),
            )
            with autocast():
                logits = model(images)
            logits = logits.float()
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(targets[:, None])  # (B, 5)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            totals += torch.stack(
                [loss.double(), top[:, 0].sum().double(), top.sum().double(), totals.new_tensor(len(targets))]
            )
    model.train(training)
    loss, top1, top5, count = context.sum(totals).tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "images": int(count)}
