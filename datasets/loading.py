"""From a split to batches: transforms, samplers, loaders. Order and draws follow from (seed, epoch, sample) alone."""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Subset
from torchvision import transforms

from datasets.classes import Relabelled, UnknownClass, match_classes
from datasets.images import shown, skipping
from datasets.registry import SOURCES, Source, build_split, class_names, count_classes
from utils.configs import DataConfig
from utils.distributed import Context, cores
from utils.errors import FarError
from utils.preprocessing import Preprocessing
from utils.seeding import seeded

log = logging.getLogger(__name__)
LOOKED_AT = 256  # files of a folder whose bytes tell whether a resumed run finds what it began with


class Transformed(Dataset):
    """A split with a transform that draws nothing."""

    def __init__(self, data: Dataset, transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        image, label = self.data[index]
        return self.transform(image), label


class Answered(Dataset):
    """A split whose labels are a model's answers, {index: class}."""

    def __init__(self, data: Dataset, answers: dict[int, int]):
        self.data, self.answers = data, answers

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index][0], self.answers[index]


class View(NamedTuple):
    """What a loader asks of a training split: which sample, the how many-th time in an epoch, and in which epoch.

    The epoch travels here, so that loader processes may live on from one to the next.
    """

    index: int
    copy: int = 0
    epoch: int = 0


class Augmented(Transformed):
    """A split with random draws, which follow from the seed and the view (a View or so many numbers) in any worker."""

    def __init__(self, data: Dataset, transform, seed: int):
        super().__init__(data, transform)
        self.seed = seed

    def __getitem__(self, view: tuple[int, ...]):
        index, copy, epoch = View(*view)
        with seeded(self.seed, epoch, index, copy):
            return super().__getitem__(index)


class Batches(BatchSampler):
    """Batches of views of an epoch, able to start in the middle of an epoch, the point at which a stopped run goes on.

    A copy's number is its sample's place in the epoch's order over all processes, divided by `period`, so that no two
    copies of a sample look alike, on whichever process each is. With the split's length as period a sample's only copy
    is number 0, and what pads the last places is number 1.
    """

    def __init__(self, sampler: DistributedSampler | RepeatAugSampler, batch_size: int, period: int):
        super().__init__(sampler, batch_size, drop_last=len(sampler) >= batch_size)
        self.start, self.epoch, self.period = 0, 0, period

    def __iter__(self) -> Iterator[list[View]]:
        rank, world = self.sampler.rank, self.sampler.num_replicas
        for number, batch in islice(enumerate(super().__iter__()), self.start, None):
            first = number * self.batch_size
            yield [View(i, (rank + k * world) // self.period, self.epoch) for k, i in enumerate(batch, first)]


@contextlib.contextmanager
def naming_dead_workers(num_workers: int) -> Iterator[None]:
    """Turns torch's RuntimeError at a loader process that died, which may come at any moment, into a FarError."""
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
    """A DataLoader whose dead worker is one line."""

    def __iter__(self):
        with naming_dead_workers(self.num_workers):
            try:
                batches = super().__iter__()
            except OSError as error:  # its queues need shared memory too
                where = f"--num-workers {self.num_workers}: loader processes cannot start ({error.strerror})"
                raise FarError(f"{where}; use --num-workers 0, or give the machine shared memory (/dev/shm)") from error
            yield from batches


class PaddedCrop(transforms.RandomCrop):
    """torchvision's, of an image of the crop's size, in a fifth of the time: PIL is black beyond an image's edge."""

    def forward(self, image: Image.Image) -> Image.Image:
        if not self.padding:
            return image
        top, left = (int(torch.randint(0, 2 * self.padding + 1, (1,))) - self.padding for _ in range(2))
        return image.crop((left, top, left + image.width, top + image.height))


class ToNormalized(transforms.Normalize):
    """torchvision's ToTensor and Normalize of an RGB image, bit-equal, in one pass of checks and no copies between."""

    def forward(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div_(255).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])


def preprocessing(config: DataConfig, source: Source, own: Preprocessing | None = None) -> Preprocessing:
    """Resize, centre crop, normalise: by flags, else as the model knows pictures (`own`), else by the data set.

    At 32 pixels and below there is no crop unless a flag asks for it: it would cut the object.
    """
    known = own or Preprocessing(source.mean, source.std)
    crop, mode = known.crop_pct, known.crop_mode
    if config.eval_crop_ratio:
        crop, mode = config.eval_crop_ratio, "center"
    elif config.input_size <= 32:
        crop, mode = 1.0, "squash"
    mean, std = tuple(config.mean or known.mean), tuple(config.std or known.std)
    return replace(known, mean=mean, std=std, crop_pct=crop, crop_mode=mode)


def train_transform(config: DataConfig, source: Source, normal: Preprocessing):
    """DeiT's augmentation by timm; at 32 pixels and below a padded random crop takes the resized crop's place."""
    try:
        transform = create_transform(
            input_size=config.input_size,
            is_training=True,
            color_jitter=config.color_jitter or None,
            auto_augment=config.aa if config.aa != "none" else None,
            interpolation=config.train_interpolation,
            re_prob=config.reprob,
            re_mode=config.remode,
            re_count=config.recount,
            mean=normal.mean,
            std=normal.std,
            hflip=(0.5 if source.flip else 0.0) if config.hflip is None else config.hflip,
            vflip=config.vflip,
        )
    except (AssertionError, ValueError) as error:  # timm's, on a policy that it does not know
        known = "see timm's auto_augment.py, or use none"
        raise FarError(
            f"--aa {shown(config.aa)}: timm cannot run it ({shown(error) or 'unknown policy'}); {known}"
        ) from error
    (k,) = (k for k, part in enumerate(transform.transforms) if isinstance(part, transforms.Normalize))
    normalize = transform.transforms[k]
    transform.transforms[k - 1 : k + 1] = [ToNormalized(normalize.mean, normalize.std)]
    if config.input_size <= 32:
        size = config.input_size
        mode = transforms.InterpolationMode(
            config.train_interpolation if config.train_interpolation != "random" else "bicubic"
        )
        crop = PaddedCrop(size, padding=size // 8)
        transform.transforms[0:1] = [transforms.Resize((size, size), mode), crop]
    return transform


def share(size: int, part: float, seed: int) -> np.ndarray:
    """A fixed random share of range(size), at least one."""
    return np.sort(np.random.default_rng(seed).permutation(size)[: max(1, round(size * part))])


def filled(names: Sequence[str], count: int) -> tuple[str, ...]:
    """So many names: after those given "class 3" and so on, but for what is among them."""
    free = (name for k in itertools.count(len(names)) if (name := f"class {k}") not in names)
    return (*names, *islice(free, count - len(names)))


def fingerprint(split: Dataset) -> str:
    """Of a split's classes and labels and, where it has files, of their names and the bytes of LOOKED_AT of them."""
    known = [getattr(split, name, None) for name in ("classes", "targets")]
    digest = hashlib.sha256(repr((len(split), *known)).encode())
    if files := list(map(str, getattr(split, "files", ()))):
        root = str(split.root)
        digest.update("\0".join(file.removeprefix(root) for file in files).encode(errors="surrogateescape"))
        for k in np.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).astype(int):
            try:
                digest.update(Path(files[k]).read_bytes())
            except OSError as error:
                raise FarError(f"{shown(files[k])}: cannot be read ({error.strerror}); mend this first") from error
    return digest.hexdigest()


class Data:
    """Both splits of a data set, and their loaders for this process.

    names: of its classes, those that it has pictures of; empty where it knows none. class_names: of all that a model
    of `num_classes` is to know. train: None where nothing trains: such a data set need not have that split.

    Args:
        own: how the model that reads the pictures prepares them.
        trains: whether the training split is wanted.
    """

    def __init__(self, config: DataConfig, context: Context, own: Preprocessing | None = None, trains: bool = True):
        self.config, self.context = config, context
        source, train, val, classes, self.names = self._open(trains or config.holdout > 0)
        self.labelled, self.num_classes = source.labelled, self._count(classes)
        self.class_names = filled(self.names, self.num_classes) if self.names else ()
        self.preprocessing = preprocessing(config, source, own)
        plain = self.preprocessing.transform(config.input_size)
        augment = train_transform(config, source, self.preprocessing) if trains else None
        self.train, self.val = self._views(train, val, augment, plain)

    def _open(self, trains: bool) -> tuple[Source, Dataset | None, Dataset | None, int | None, tuple[str, ...]]:
        """What is known of the data set: its kind, both splits, its classes and their names."""
        config, name = self.config, self.config.dataset
        if config.download:
            if self.context.main:
                for train in (True, False):
                    build_split(name, config.root, train, True)
            self.context.barrier()
        train = self._build(True) if trains else None
        val = None if config.holdout else self._build(False)
        self.splits = splits = [split for split in (train, val) if split is not None]
        if len(splits) == 2:
            val = self._agreeing(class_names(name, train), class_names(name, val), val)
        if (skipped := [path for split in splits for path in getattr(split, "skipped", ())]) and self.context.main:
            log.warning("%s", skipping(f"--data-path {shown(config.root)}", skipped))
        return SOURCES[name], train, val, count_classes(name, splits[0]), class_names(name, splits[0])

    def _agreeing(self, ours: tuple[str, ...], theirs: tuple[str, ...], val: Dataset) -> Dataset:
        """The evaluation split with the training split's numbers of classes. Raises FarError where one lacks some."""
        if not (ours and theirs) or ours == theirs:
            return val
        try:
            labels = match_classes(ours, theirs)
            match_classes(theirs, ours)
        except UnknownClass as error:
            where = f"--data-path {shown(self.config.root)}: class {shown(error)}"
            raise FarError(f"{where} is in only one of train/ and val/; make the class folders agree") from error
        return Relabelled(val, labels)

    def _views(self, train: Dataset | None, val: Dataset | None, augment, plain) -> tuple[Dataset | None, Dataset]:
        """The training split as it is augmented, the evaluation split as it is evaluated."""
        train, val = self._split(train, val)
        return Augmented(train, augment, self.config.seed) if augment else None, Transformed(val, plain)

    def _build(self, train: bool) -> Dataset:
        return build_split(self.config.dataset, self.config.root, train, category=self.config.inat_category)

    def _count(self, found: int | None) -> int | None:
        """The classes that a model is to know. Raises FarError where --nb-classes leaves some of the data out."""
        asked = self.config.nb_classes
        if asked and found and found > asked:
            raise FarError(f"--nb-classes {asked}: --dataset {self.config.dataset} has {found}; give at least those")
        return asked or found

    def _split(self, train: Dataset | None, val: Dataset | None) -> tuple[Dataset | None, Dataset]:
        """What trains and what evaluates after --holdout and --train-subset. Raises FarError on too few images."""
        config = self.config
        if val is None:
            # Tuning reads a share of the training split, so that the evaluation split stays unseen.
            held = share(len(train), config.holdout, 0)
            rest = np.setdiff1d(np.arange(len(train)), held)
            train, val = Subset(train, rest.tolist()), Subset(train, held.tolist())
        if train is not None and config.train_subset < 1:
            train = Subset(train, share(len(train), config.train_subset, config.seed).tolist())
        for split, data in (("training", train), ("evaluation", val)):
            if data is None:
                continue
            if not len(data):
                where = f"--holdout {config.holdout:g}, --data-path {shown(config.root)}"
                raise FarError(f"{where}: no {split} images are left; hold out less or add images")
            if len(data) < self.context.world:
                where = f"--nproc_per_node: {self.context.world} processes but {len(data)} {split} images"
                raise FarError(f"{where}; start fewer processes")
        return train, val

    def fingerprint(self) -> str:
        """Of what the splits hold, wherever they lie. Raises FarError where a file cannot be read."""
        return hashlib.sha256("".join(map(fingerprint, self.splits)).encode()).hexdigest()

    def relabel(self, classes: tuple[str, ...]) -> None:
        """From here on labels are numbers of `classes`, a model's, matched by name. Raises UnknownClass."""
        labels = match_classes(classes, self.names)
        if labels != list(range(len(labels))):
            self.val = Relabelled(self.val, labels)
            self.train = None if self.train is None else Relabelled(self.train, labels)
        self.class_names, self.num_classes = classes, len(classes)

    @property
    def workers(self) -> int:
        """Loader processes: as many as asked for, but no more than this process has cores."""
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
        """Training images as this process alone reads and augments them, over and over."""
        return (self.train[i % len(self.train), 0][0] for i in itertools.count())

    def smallest_batch(self, batch_size: int) -> int:
        """Images in every training batch of a process: `batch_size`, or all of its share where that is smaller."""
        return min(batch_size, len(self._sampler()))

    def train_loader(self, batch_size: int) -> Loader:
        """Batches of `batch_size` a process. Global batch k is the same set of samples whatever the world size."""
        period = 1 if self.config.repeated_aug else len(self.train)
        return self._loader(self.train, batch_sampler=Batches(self._sampler(), batch_size, period))

    def at(self, loader: Loader, epoch: int, start: int = 0) -> Loader:
        """Sets a training loader to batch `start` of an epoch."""
        loader.batch_sampler.sampler.set_epoch(epoch + (self.config.seed if self.config.repeated_aug else 0))
        loader.batch_sampler.start, loader.batch_sampler.epoch = start, epoch
        return loader

    def answer(self, answers: Iterable[int], num_classes: int) -> None:
        """Evaluates this process's share by a model's answers, in `val_loader`'s order, from here on."""
        self.num_classes = num_classes
        self.val = Answered(self.val, dict(zip(self._share(), answers, strict=True)))

    def _share(self) -> range:
        return range(self.context.rank, len(self.val), self.context.world)

    def val_loader(self, batch_size: int) -> Loader:
        """This process's share of the evaluation split: every image once over all processes, none twice."""
        return self._loader(Subset(self.val, self._share()), batch_size=batch_size)
