"""From a split to batches: transforms, samplers, loaders. Order and draws follow from (seed, epoch, sample) alone."""

import contextlib
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Subset
from torchvision import transforms

from datasets.classes import Relabelled, UnknownClass, match_classes
from datasets.images import skipping
from datasets.registry import SOURCES, Source, build_split, class_names, count_classes
from utils import signals
from utils.configs import DataConfig
from utils.distributed import Context, cores
from utils.errors import FarError
from utils.preprocessing import Preprocessing
from utils.seeding import seeded

log = logging.getLogger(__name__)
SAMPLED_FILES = 256  # files of a folder whose bytes tell whether a resumed run finds the data it began with


class Transformed(Dataset):
    """A split with a transform that draws nothing."""

    def __init__(self, data: Dataset, transform: Callable):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, label = self.data[index]
        return self.transform(image), label


class Augmented(Transformed):
    """A split with a random transform, seeded per sample by (seed, epoch, index, copy) in whichever worker.

    An item is asked for by (index, copy, epoch), epoch 0 by default: the epoch travels with the index, so that loader
    workers may persist from one epoch to the next.
    """

    def __init__(self, data: Dataset, transform: Callable, seed: int):
        super().__init__(data, transform)
        self.seed = seed

    def __getitem__(self, key: tuple[int, ...]):
        index, copy, epoch = (*key, 0)[:3]
        with seeded(self.seed, epoch, index, copy):
            return super().__getitem__(index)


class PseudoLabelled(Relabelled):
    """A split whose labels are a model's predictions, {index: class}."""

    def __getitem__(self, index: int):
        return self.data[index][0], self.labels[index]


class Batches(BatchSampler):
    """Batches of (index, copy, epoch), from batch `start` of an epoch on.

    A sample's copy is its place in the epoch's order over all processes, divided by `period`: 1 for repeated
    augmentation, where each place is a copy of its own; else the split's length, which makes the samples that pad the
    last places copy 1. So no two views of a sample are alike, whichever processes they are on.
    """

    def __init__(self, sampler: DistributedSampler | RepeatAugSampler, batch_size: int, period: int):
        super().__init__(sampler, batch_size, drop_last=len(sampler) >= batch_size)
        self.start, self.epoch, self.period = 0, 0, period

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rank, world = self.sampler.rank, self.sampler.num_replicas
        for number, batch in islice(enumerate(super().__iter__()), self.start, None):
            places = itertools.count(rank + number * self.batch_size * world, world)
            yield [(index, place // self.period, self.epoch) for index, place in zip(batch, places, strict=False)]


@contextlib.contextmanager
def naming_dead_workers(num_workers: int) -> Iterator[None]:
    """Turns torch's RuntimeError at a loader worker that died, which may come at any moment, into a FarError."""
    try:
        yield
    except RuntimeError as error:
        if "unable to allocate shared memory" in str(error) or "shared memory (shm)" in str(error):
            cause = "no shared memory is left (/dev/shm; in a container, docker run --shm-size sets it)"
        elif "ancdata" in str(error) or "Too many open files" in str(error):
            cause = "too many open files (ulimit -n allows more)"
        elif str(error).startswith("DataLoader worker (pid"):
            cause = "a loader process died, most likely for want of memory or shared memory"
        else:
            raise
        raise FarError(f"--num-workers {num_workers}: {cause}; use fewer workers or a smaller batch") from error


class Loader(DataLoader):
    """A DataLoader whose dead worker is one line, and whose workers end by a SIGTERM of this process alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, worker_init_fn=signals.end_by_parent_alone, **kwargs)

    def __iter__(self):
        with naming_dead_workers(self.num_workers):
            yield from super().__iter__()


def preprocessing(config: DataConfig, source: Source, model: Preprocessing | None = None) -> Preprocessing:
    """Resize, centre crop, normalise: by flags, else as the model's checkpoint says, else the data set's.

    At 32 pixels and below there is no crop unless a flag asks for it: it would cut the object.
    """
    known = model or Preprocessing(source.mean, source.std)
    crop, mode = known.crop_pct, known.crop_mode
    if config.eval_crop_ratio:
        crop, mode = config.eval_crop_ratio, "center"
    elif config.input_size <= 32:
        crop, mode = 1.0, "squash"
    mean, std = tuple(config.mean or known.mean), tuple(config.std or known.std)
    return replace(known, mean=mean, std=std, crop_pct=crop, crop_mode=mode)


def train_transform(config: DataConfig, source: Source, normal: Preprocessing):
    """DeiT's augmentation by timm; at 32 pixels and below a padded random crop takes the resized crop's place.

    Raises FarError where timm cannot run the --aa policy.
    """
    size, interpolation = config.input_size, config.train_interpolation
    family, *parts = config.aa.split("-")
    for part in parts:  # timm passes over what it cannot split into a name and a number, and a typo would go unnoticed
        if not re.fullmatch(r"t.*" if family == "rand" and part.startswith("t") else r"\D+\d.*", part):
            raise FarError(f"--aa {config.aa}: part {part!r} is unknown; see timm's auto_augment.py")
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=config.color_jitter or None,
            auto_augment=None if config.aa == "none" else config.aa,
            interpolation=interpolation,
            re_prob=config.reprob,
            re_mode=config.remode,
            re_count=config.recount,
            mean=normal.mean,
            std=normal.std,
            hflip=(0.5 if source.flip else 0.0) if config.hflip is None else config.hflip,
            vflip=config.vflip,
        )
        with seeded(0):
            transform(Image.new("RGB", (size, size)))
    except (AssertionError, ArithmeticError, MemoryError, ValueError) as error:
        where = f"--aa {config.aa}: timm cannot run it ({str(error) or 'unknown policy'})"
        raise FarError(f"{where}; see timm's auto_augment.py, or use none") from error
    if size <= 32:
        mode = transforms.InterpolationMode("bicubic" if interpolation == "random" else interpolation)
        crop = transforms.RandomCrop(size, padding=size // 8)
        transform.transforms[0:1] = [transforms.Resize((size, size), mode), crop]
    return transform


def random_share(size: int, part: float, seed: int) -> np.ndarray:
    """A fixed random share of range(size), at least one."""
    return np.sort(np.random.default_rng(seed).permutation(size)[: max(1, round(size * part))])


def split_off(split: Dataset, part: float, seed: int) -> tuple[Subset, Subset]:
    """A fixed random share of a split, and the rest."""
    held = random_share(len(split), part, seed)
    rest = np.setdiff1d(np.arange(len(split)), held)
    return Subset(split, held.tolist()), Subset(split, rest.tolist())


def pad_class_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` names: those given, then "class 3" and so on, skipping any that are taken."""
    free = (name for k in itertools.count(len(names)) if (name := f"class {k}") not in names)
    return (*names, *islice(free, count - len(names)))


def fingerprint(split: Dataset) -> str:
    """SHA-256 of a split's classes and labels and, where it has files, of their names and SAMPLED_FILES' bytes."""
    known = [getattr(split, name, None) for name in ("classes", "targets")]
    digest = hashlib.sha256(repr((len(split), *known)).encode())
    if files := list(map(str, getattr(split, "files", ()))):
        root = str(split.root)
        digest.update("\0".join(file.removeprefix(root) for file in files).encode(errors="surrogateescape"))
        for k in np.linspace(0, len(files) - 1, min(SAMPLED_FILES, len(files))).astype(int):
            try:
                digest.update(Path(files[k]).read_bytes())
            except OSError as error:
                raise FarError(f"{files[k]}: cannot be read ({error.strerror}); mend this first") from error
    return digest.hexdigest()


def resolve_num_classes(config: DataConfig, counted: int | None) -> int | None:
    """--nb-classes, else the data set's count. Raises FarError where the flag leaves some of the data out."""
    if config.nb_classes and counted and counted > config.nb_classes:
        raise FarError(f"--nb-classes {config.nb_classes}: --dataset {config.dataset} has {counted}; give as many")
    return config.nb_classes or counted


class Data:
    """Both splits of a data set, and their loaders for this process.

    Args:
        model: how the model that reads the images prepares them; None: as the data set's own statistics say.
        trains: whether the training split is wanted; a data set that is only evaluated need not have one.

    Attributes:
        train, val: the transformed splits; train is None where nothing trains.
        aside: training images kept out of training, as they are evaluated; None where none are asked for.
        names: the classes that the data set has images of; empty where it knows none.
        class_names: the `num_classes` classes that a model is to know.
    """

    def __init__(self, config: DataConfig, context: Context, model: Preprocessing | None = None, trains: bool = True):
        self.config, self.context = config, context
        name, root = config.dataset, config.root
        if config.download:
            if context.main:
                for train in (True, False):
                    build_split(name, root, train, download=True)
            context.barrier()
        train = build_split(name, root, True, category=config.inat_category) if trains or config.holdout else None
        val = None if config.holdout else build_split(name, root, False, category=config.inat_category)
        self.splits = [split for split in (train, val) if split is not None]

        source = SOURCES[name]
        self.labelled, self.names = source.labelled, class_names(name, self.splits[0])
        self.num_classes = resolve_num_classes(config, count_classes(name, self.splits[0]))
        self.class_names = pad_class_names(self.names, self.num_classes) if self.names else ()
        if train is not None and val is not None and self.names != (val_names := class_names(name, val)):
            try:  # the two splits may list the same classes in different orders
                match_classes(val_names, self.names)
                val = Relabelled(val, match_classes(self.names, val_names))
            except UnknownClass as error:
                where = f"--data-path {root}: class {error}"
                raise FarError(f"{where} is in only one of train/ and val/; make the class folders agree") from error
        if context.main and (skipped := [path for split in self.splits for path in getattr(split, "skipped", ())]):
            log.warning("%s", skipping(f"--data-path {root}", skipped))

        if config.holdout:  # evaluate on a share of the training split, so that the evaluation split stays unseen
            val, train = split_off(train, config.holdout, 0)
        self.aside = None
        if train is not None and config.aside:
            self.aside, train = split_off(train, min(1 / 8, config.aside / len(train)), 1)
        if train is not None and config.train_subset < 1:
            train = Subset(train, random_share(len(train), config.train_subset, config.seed).tolist())
        for split, data in (("training", train), ("evaluation", val)):
            if data is not None and not len(data):
                where = f"--holdout {config.holdout:g}, --data-path {root}"
                raise FarError(f"{where}: no {split} images are left; hold out less or add images")
            if data is not None and len(data) < context.world:
                where = f"--nproc_per_node: {context.world} processes but {len(data)} {split} images"
                raise FarError(f"{where}; start fewer processes")

        self.preprocessing = preprocessing(config, source, model)
        self.train = None
        if trains:
            self.train = Augmented(train, train_transform(config, source, self.preprocessing), config.seed)
        plain = self.preprocessing.transform(config.input_size)
        self.val = Transformed(val, plain)
        self.aside = Transformed(self.aside, plain) if self.aside else None

    def fingerprint(self) -> str:
        """SHA-256 of what the splits hold, wherever they lie. Raises FarError where a file cannot be read."""
        return hashlib.sha256("".join(map(fingerprint, self.splits)).encode()).hexdigest()

    def relabel(self, classes: tuple[str, ...]) -> None:
        """Maps labels, by name, to indices of `classes`, a model's. Raises UnknownClass."""
        labels = match_classes(classes, self.names)
        if labels != list(range(len(labels))):
            self.val = Relabelled(self.val, labels)
            self.train = None if self.train is None else Relabelled(self.train, labels)
        self.class_names, self.num_classes = classes, len(classes)

    def set_labels(self, labels: Iterable[int], num_classes: int) -> None:
        """Replaces the labels of this process's share by a model's predictions, in `val_loader`'s order."""
        self.num_classes = num_classes
        self.val = PseudoLabelled(self.val, dict(zip(self._indices(self.val), labels, strict=True)))

    @property
    def workers(self) -> int:
        """Loader workers: --num-workers, but no more than this process has cores."""
        return min(self.config.num_workers, cores())

    def _loader(self, data: Dataset, **kwargs) -> Loader:
        return Loader(
            data,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.context.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),
            **kwargs,
        )

    def _sampler(self) -> DistributedSampler | RepeatAugSampler:
        world, rank = self.context.world, self.context.rank
        if self.config.repeated_aug:
            return RepeatAugSampler(self.train, world, rank, shuffle=True, num_repeats=3, selected_round=0)
        return DistributedSampler(self.train, world, rank, shuffle=True, seed=self.config.seed)

    def pictures(self) -> Iterator[Tensor]:
        """Augmented training images (3, S, S) as this process alone reads them, endlessly."""
        return (self.train[i % len(self.train), 0][0] for i in itertools.count())

    def smallest_batch(self, batch_size: int) -> int:
        """Images in every training batch of a process: `batch_size`, or all of its share where that is smaller."""
        return min(batch_size, len(self._sampler()))

    def train_loader(self, batch_size: int) -> Loader:
        """Batches of `batch_size` a process. Global batch k is the same set of samples whatever the world size."""
        period = 1 if self.config.repeated_aug else len(self.train)
        return self._loader(self.train, batch_sampler=Batches(self._sampler(), batch_size, period))

    def seek(self, loader: Loader, epoch: int, start: int = 0) -> Loader:
        """Sets a training loader to batch `start` of an epoch."""
        loader.batch_sampler.sampler.set_epoch(epoch + (self.config.seed if self.config.repeated_aug else 0))
        loader.batch_sampler.start, loader.batch_sampler.epoch = start, epoch
        return loader

    def _indices(self, split: Dataset) -> range:
        """This process's share of a split: every image once over all processes, none twice."""
        return range(self.context.rank, len(split), self.context.world)

    def aside_loader(self, batch_size: int) -> Loader:
        """This process's share of the images kept aside."""
        return self._loader(Subset(self.aside, self._indices(self.aside)), batch_size=batch_size)

    def val_loader(self, batch_size: int) -> Loader:
        """This process's share of the evaluation split."""
        return self._loader(Subset(self.val, self._indices(self.val)), batch_size=batch_size)
