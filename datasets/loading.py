"""From a split to batches: transforms, samplers, loaders. Order and augmentation follow from (seed, epoch, sample) alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, Subset
from torchvision import transforms

from datasets.registry import SOURCES, Source, build_split, count_classes
from utils.distributed import Context
from utils.errors import FarError
from utils.seeding import seeded


@dataclass(frozen=True)
class DataConfig:
    """What the data flags say; see `utils.arguments` for each."""

    name: str
    root: Path
    input_size: int
    download: bool = False
    subset: float = 1.0
    holdout: float = 0.0
    color_jitter: float = 0.3
    aa: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    eval_crop_ratio: float = 0.875
    repeated_aug: bool = False
    num_workers: int = 8
    seed: int = 42


class Transformed(Dataset):
    """A split with its transform; the draws of sample i in epoch e follow from (seed, e, i), whichever worker makes it.

    Under repeated augmentation one sample comes several times an epoch: `repeat` then numbers its copies by position.
    """

    def __init__(self, data: Dataset, transform, seed: int):
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: int | tuple[int, int]):
        index, copy = key if isinstance(key, tuple) else (key, 0)
        image, label = self.data[index]
        with seeded(self.seed, self.epoch, index, copy):
            return self.transform(image), label


class Batches(BatchSampler):
    """Batches of one process, able to start in the middle of an epoch, the point at which a stopped run goes on."""

    def __init__(self, sampler: Sampler, batch_size: int, drop_last: bool, copies: int = 0):
        super().__init__(sampler, batch_size, drop_last)
        self.start, self.copies = 0, copies

    def __iter__(self) -> Iterator[list]:
        for number, batch in islice(enumerate(super().__iter__()), self.start, None):
            # A copy's number is its place in the epoch: two copies of a sample get different augmentations.
            yield [(i, number * self.batch_size + j + self.copies) for j, i in enumerate(batch)] if self.copies else batch


def train_transform(config: DataConfig, source: Source):
    """DeiT's augmentation by timm; at 32 pixels and below a padded random crop takes the resized crop's place."""
    transform = create_transform(
        input_size=config.input_size, is_training=True, color_jitter=config.color_jitter or None,
        auto_augment=config.aa if config.aa != "none" else None, interpolation=config.interpolation,
        re_prob=config.reprob, re_mode=config.remode, re_count=config.recount,
        mean=source.mean, std=source.std, hflip=0.5 if source.flip else 0.0,
    )  # fmt: skip
    if config.input_size <= 32:
        size = config.input_size
        mode = transforms.InterpolationMode(config.interpolation if config.interpolation != "random" else "bicubic")
        transform.transforms[0:1] = [transforms.Resize((size, size), mode), transforms.RandomCrop(size, padding=size // 8)]
    return transform


def eval_transform(config: DataConfig, source: Source):
    """Resize, centre crop, normalise. The ratio applies above 32 pixels; below, cropping would cut the object."""
    ratio = config.eval_crop_ratio if config.input_size > 32 else 1.0
    size = math.floor(config.input_size / ratio)
    return transforms.Compose([
        transforms.Resize(size if config.input_size > 32 else (size, size), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(config.input_size),
        transforms.ToTensor(),
        transforms.Normalize(source.mean, source.std),
    ])  # fmt: skip


def share(size: int, part: float, seed: int) -> np.ndarray:
    """A fixed random share of range(size), at least one."""
    return np.sort(np.random.default_rng(seed).permutation(size)[: max(1, round(size * part))])


class Data:
    """Both splits of a data set, and their loaders for this process."""

    def __init__(self, config: DataConfig, context: Context):
        if config.download:
            if context.main:
                build_split(config.name, config.root, True, True), build_split(config.name, config.root, False, True)
            context.barrier()
        self.config, self.context = config, context
        source = SOURCES.get(config.name)
        train = build_split(config.name, config.root, True)
        self.num_classes = count_classes(config.name, train)
        val = None
        if config.holdout:
            # Tuning reads a share of the training split, so that the evaluation split stays unseen.
            held = share(len(train), config.holdout, 0)
            rest = np.setdiff1d(np.arange(len(train)), held)
            train, val = Subset(train, rest.tolist()), Subset(train, held.tolist())
        val = val or build_split(config.name, config.root, False)
        if config.subset < 1:
            train = Subset(train, share(len(train), config.subset, config.seed).tolist())
        for flag, data in (("training", train), ("evaluation", val)):
            if len(data) < context.world:
                raise FarError(
                    f"--nproc_per_node: {context.world} processes but {len(data)} {flag} images; start fewer processes"
                )
        self.train = Transformed(train, train_transform(config, source), config.seed)
        self.val = Transformed(val, eval_transform(config, source), config.seed)

    def _loader(self, data: Dataset, **kwargs) -> DataLoader:
        return DataLoader(
            data, num_workers=self.config.num_workers, pin_memory=self.context.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed), **kwargs,
        )  # fmt: skip

    def train_loader(self, batch_size: int) -> DataLoader:
        """Batches of `batch_size` a process. Global batch k is the same set of samples whatever the world size."""
        world, rank = self.context.world, self.context.rank
        if self.config.repeated_aug:
            sampler = RepeatAugSampler(self.train, world, rank, shuffle=True, num_repeats=3, selected_round=0)
        else:
            sampler = DistributedSampler(self.train, world, rank, shuffle=True, seed=self.config.seed)
        batches = Batches(sampler, batch_size, len(sampler) >= batch_size, int(self.config.repeated_aug))
        return self._loader(self.train, batch_sampler=batches)

    def at(self, loader: DataLoader, epoch: int, start: int = 0) -> DataLoader:
        """Sets a training loader to batch `start` of an epoch."""
        loader.batch_sampler.sampler.set_epoch(epoch + (self.config.seed if self.config.repeated_aug else 0))
        loader.batch_sampler.start = start
        self.train.epoch = epoch
        return loader

    def val_loader(self, batch_size: int) -> DataLoader:
        """This process's share of the evaluation split: every image once over all processes, none twice."""
        mine = range(self.context.rank, len(self.val), self.context.world)
        return self._loader(Subset(self.val, mine), batch_size=batch_size)
