"""What hidden units carry on real images: a score that follows from it, and a closed form that makes up for removal."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datasets.loading import Data
from engine.hoyer import Norms, unit_norms
from engine.shrink import Kept
from models.parts import BlockPart, Place
from utils.distributed import Context

BATCHES = 8  # of training images
RIDGE = 1e-3  # of the units' mean square, so that units which hardly vary get no large weights

# By places that are read together: (u + 1, u + 1), sums over images and tokens of the products of their units and 1.
Grams = dict[tuple[Place, ...], Tensor]


def first_batches(data: Data, batch_size: int, context: Context) -> Iterator[Tensor]:
    """The images of the first BATCHES training batches of this process, on its device."""
    for images, _ in islice(data.seek(data.train_loader(batch_size), 0), BATCHES):
        yield images.to(context.device)


def _consumers(parts: Mapping[int, BlockPart]) -> Iterator[tuple[tuple[Place, ...], nn.Linear, list]]:
    """`BlockPart.consumers` of parts by block, their places with the block in front."""
    for i, part in parts.items():
        for consumers in part.consumers():
            readers = [(weight, bias, [(i, *place) for place in places]) for weight, bias, places in consumers.readers]
            yield tuple((i, *place) for place in consumers.places), consumers.seen, readers


@torch.no_grad()
def unit_grams(
    model: VisionTransformer,
    parts: Mapping[int, BlockPart],
    images: Iterable[Tensor],
    context: Context,
    autocast: Callable,
) -> Grams:
    """Of the units of parts by block, over batches of images (B, 3, S, S) of all processes, the model in eval mode."""
    grams: Grams = {}
    handles = []

    def add(places: tuple[Place, ...], _: nn.Module, args: tuple[Tensor]) -> None:
        units = args[0].flatten(0, -2).double()  # (B N, u)
        units = torch.cat([units, torch.ones_like(units[:, :1])], 1)
        grams[places] += units.T @ units

    for places, seen, _ in _consumers(parts):
        size = seen.in_features + 1
        grams[places] = torch.zeros(size, size, dtype=torch.float64, device=context.device)
        handles.append(seen.register_forward_pre_hook(partial(add, places)))
    training = model.training
    model.eval()
    for batch in images:
        with autocast():
            model(batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    return {places: context.sum(gram) for places, gram in grams.items()}


def _covariance(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (u,) and covariance (u, u)."""
    count, mean = gram[-1, -1], gram[-1, :-1] / gram[-1, -1]
    return mean, gram[:-1, :-1] / count - torch.outer(mean, mean)


def activation_score(parts: Mapping[int, BlockPart], grams: Grams) -> Norms:
    """By place, (u,): a unit's standard deviation times the norm of its column in the map behind it."""
    sizes, by_place = {place: len(s) for place, s in unit_norms(parts).items()}, {}
    for places, consumer, _ in _consumers(parts):
        deviation = _covariance(grams[places])[1].diagonal().clamp_min(0).sqrt()
        scores = (deviation * consumer.weight.detach().norm(dim=0)).to(consumer.weight)
        by_place |= zip(places, scores.split([sizes[place] for place in places]), strict=True)
    return by_place


@torch.no_grad()
def refit(parts: Mapping[int, BlockPart], kept: Kept, grams: Grams) -> None:
    """Makes up for units that are not kept, before `shrink` removes them.

    Whatever reads a removed unit reads instead its least-squares guess from the kept units that it reads besides, which
    is linear: it goes into their columns and the bias.
    """
    sizes = {place: len(s) for place, s in unit_norms(parts).items()}
    for places, _, readers in _consumers(parts):
        starts = dict(zip(places, torch.tensor([0, *(sizes[p] for p in places)]).cumsum(0).tolist(), strict=False))
        mean, covariance = _covariance(grams[places])
        for weight, bias, read in readers:
            index = torch.cat([starts[p] + torch.arange(sizes[p]) for p in read]).to(mean.device)
            stays = torch.cat([torch.isin(torch.arange(sizes[p]), kept[p].cpu()) for p in read]).to(mean.device)
            _redirect(weight, bias, stays, mean[index], covariance[index][:, index])


def _redirect(weight: Tensor, bias: Tensor, stays: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """weight (out, u), bias (out,) of a map over units with this mean (u,) and covariance (u, u); in place."""
    among = covariance[stays][:, stays]
    ridge = RIDGE * covariance.diagonal().mean() + torch.finfo(among.dtype).tiny
    among = among + ridge * torch.eye(len(among), dtype=among.dtype, device=among.device)
    guess = torch.linalg.solve(among, covariance[stays][:, ~stays])  # (kept, removed)
    lost = weight[:, ~stays].double()
    weight[:, stays] += (lost @ guess.T).to(weight)
    bias += (lost @ (mean[~stays] - mean[stays] @ guess)).to(bias)
