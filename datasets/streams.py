"""Data sets read from front to back by timm's readers: wds/NAME (WebDataset tars), tfds/NAME (TensorFlow Datasets).

Iterable data sets have no sample indices. So order and random draws follow from (seed, epoch, process, loader worker,
place in that worker's order): other than with folders, they change with the number of processes and of workers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice, repeat

import numpy as np
import torch
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from datasets.images import to_rgb
from datasets.loading import Data, Loader, preprocessing, resolve_num_classes, train_transform
from datasets.registry import SOURCES
from utils import names
from utils.configs import DataConfig
from utils.distributed import Context
from utils.errors import FarError, require
from utils.preprocessing import Preprocessing
from utils.seeding import seeded

# By the name before the slash: the package that timm's reader needs, and what pip is to install.
PACKAGES = {"wds": ("webdataset", "webdataset"), "tfds": ("tensorflow_datasets", "tensorflow-cpu tensorflow-datasets")}


@dataclass(frozen=True)
class Split:
    """lengths: samples in each piece that loader workers divide among themselves: a tar, or one example of tfds."""

    name: str
    lengths: Sequence[int]
    num_classes: int | None  # None: not told


def open_split(config: DataConfig, name: str) -> Split:
    """Raises FarError where the split is not there, or the package that reads it is not installed."""
    kind, root = config.dataset.partition("/")[0], config.root
    package, install = PACKAGES[kind]
    require(f"--dataset {config.dataset}", package, install=install)
    if kind == "tfds":
        try:
            reader = create_dataset(config.dataset, root, split=name).reader
        except (OSError, ValueError, KeyError, AssertionError) as error:
            where = f"--data-path {root}: no split {name} of {config.dataset} there ({error})"
            raise FarError(f"{where}; make it with the command tfds build") from error
        return Split(name, (1,) * reader.num_samples, len(reader.class_to_idx) or None)
    listing = root / "_info.json"
    try:
        info = json.loads(listing.read_text(encoding="utf-8"))
        split = info["splits"][name]
        tars, lengths = [root / tar for tar in split["filenames"]], split["shard_lengths"]
        if len(tars) != len(lengths) or sum(lengths) != split["num_samples"]:
            raise ValueError("its filenames, shard_lengths and num_samples do not agree")
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"--data-path {listing}: does not describe a split {name} ({type(error).__name__}: {error})"
        raise FarError(f"{where}; put the tars' _info.json there, as timm's data sets on the hub have it") from error
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise FarError(f"--data-path {missing[0]}: not there, but {listing.name} names it; fetch it")
    return Split(name, lengths, split.get("num_classes", info.get("num_classes")))


@dataclass
class Stream(IterableDataset):
    """One process's part of a split, transformed, as its loader workers read it."""

    config: DataConfig
    split: Split
    transform: Callable
    num_classes: int
    rank: int
    world: int
    batch_size: int = 1
    epoch: int = 0

    def __len__(self) -> int:
        """Samples of the split, over all processes."""
        return sum(self.split.lengths)

    @property
    def is_tfds(self) -> bool:
        return self.config.dataset.startswith("tfds/")

    @property
    def workers(self) -> int:
        """Loader workers: not limited by this machine's cores, because what is read when depends on their number."""
        fewest = int(self.is_tfds)  # timm's reader of tfds splits among workers only
        return max(fewest, min(self.config.num_workers, self.pieces))

    def reader(self, is_training: bool, split: str):
        """timm's reader, new for each epoch, so that its shuffles have no state from earlier ones."""
        seed = np.random.SeedSequence([self.config.seed, self.epoch]).generate_state(1)[0] >> 1
        kwargs = {"split": split, "is_training": is_training, "batch_size": self.batch_size, "seed": int(seed)}
        mode = "RGB" if self.is_tfds else ""  # tars' images keep their mode for to_rgb
        root = self.config.root.absolute()  # webdataset would take some relative names for addresses
        return create_dataset(self.config.dataset, root, input_img_mode=mode, **kwargs).reader

    def samples(self, reader) -> Iterator[tuple[torch.Tensor, int]]:
        """RGB images and labels. Raises FarError at an image or a label that the model cannot read."""
        for image, label in reader:
            try:
                if label not in range(self.num_classes):
                    raise ValueError(f"a label {label}, not of 0 to {self.num_classes - 1}")
                image = to_rgb(image)
            except ValueError as error:
                where = f"--data-path {self.config.root}: split {self.split.name}: holds {error}"
                raise FarError(f"{where}; mend it or --nb-classes") from error
            yield image, label


class Training(Stream):
    """Shuffled by tars, then within a buffer.

    Each loader worker fills whole batches, beginning again where its tars end before the others'. So all processes take
    equally many steps. timm's reader warns of what it cannot read, and passes over it.
    """

    @property
    def pieces(self) -> int:
        """The most workers that each have a piece to read."""
        return len(self.split.lengths) // self.world

    def steps(self, batch_size: int) -> int:
        """Batches an epoch of a process, as timm's reader counts them."""
        workers = max(1, self.workers)
        return math.ceil(math.ceil(len(self) / (self.world * workers)) / batch_size) * workers

    def __iter__(self):
        reader = self.reader(True, self.split.name)
        reader.dist_rank, reader.dist_num_replicas = self.rank, self.world
        worker = info.id if (info := get_worker_info()) else 0
        for place, (image, label) in enumerate(self.samples(reader)):
            with seeded(self.config.seed, self.epoch, self.rank, worker, place):
                yield self.transform(image), label


class Evaluation(Stream):
    """Every sample once over all processes, in the split's order.

    timm pads the parts of several processes to equal lengths. So each process opens its own part of the split as if it
    were alone.
    """

    @property
    def lengths(self) -> Sequence[int]:
        return self.split.lengths[self.rank :: self.world]

    @property
    def pieces(self) -> int:
        return len(self.lengths)

    def steps(self, batch_size: int) -> int:
        workers = max(1, self.workers)
        return sum(math.ceil(sum(self.lengths[worker::workers]) / batch_size) for worker in range(workers))

    def __iter__(self):
        if not self.lengths:
            return
        if self.is_tfds:
            ends = list(accumulate((len(range(rank, len(self), self.world)) for rank in range(self.world)), initial=0))
            reader = self.reader(False, f"{self.split.name}[{ends[self.rank]}:{ends[self.rank + 1]}]")
        else:
            reader = self.reader(False, self.split.name)
            reader.split_info.filenames = reader.split_info.filenames[self.rank :: self.world]
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        count, expected = 0, sum(self.lengths[worker::workers])
        for image, label in self.samples(reader):
            count += 1
            yield self.transform(image), label
        if count != expected:
            where = f"--data-path {self.config.root}: split {self.split.name}"
            raise FarError(f"{where}: holds {count} readable images of {expected}; fetch its files again")


class StreamLoader(Loader):
    """Batches of a stream, without the first `start`, which a resumed epoch reads again and leaves out."""

    start = 0

    def __len__(self) -> int:
        return self.dataset.steps(self.batch_size)

    def __iter__(self):
        yield from islice(super().__iter__(), self.start, None)


class Streams(Data):
    """Both splits of a stream, named train and validation. tfds/NAME takes the same path, but no test reads one."""

    def __init__(self, config: DataConfig, context: Context, model: Preprocessing | None = None, trains: bool = True):
        self.config, self.context, self.aside = config, context, None
        for flag, given in (
            ("--holdout", config.holdout),
            ("--replace auto", config.aside),
            ("--train-subset", config.train_subset < 1),
            ("--repeated-aug", config.repeated_aug),
            ("--inat-category", config.inat_category != "name"),
            ("--download", config.download),
        ):
            if given:
                where = f"{flag}: not with --dataset {config.dataset}, which is read from front to back"
                raise FarError(f"{where}; leave it out, or take class folders (--dataset FOLDER)")
        train, val = open_split(config, "train") if trains else None, open_split(config, "validation")
        if train and len(train.lengths) < context.world:
            where = f"--nproc_per_node: {context.world} processes but {len(train.lengths)} training tars"
            raise FarError(f"{where}; start fewer processes, or write more tars")
        self.splits = [split for split in (train, val) if split]
        self.labelled, self.names, self.class_names = True, (), ()
        self.num_classes = resolve_num_classes(config, self.splits[0].num_classes)
        if not self.num_classes:
            raise FarError(f"--dataset {config.dataset}: does not tell its number of classes; name --nb-classes")
        source, parts = SOURCES["FOLDER"], (self.num_classes, context.rank, context.world)
        self.preprocessing = preprocessing(config, source, model)
        augment = train_transform(config, source, self.preprocessing) if trains else None
        self.train = Training(config, train, augment, *parts) if trains else None
        self.val = Evaluation(config, val, self.preprocessing.transform(config.input_size), *parts)

    def fingerprint(self) -> str:
        """SHA-256 of the lengths of the splits' tars."""
        return hashlib.sha256(repr([list(split.lengths) for split in self.splits]).encode()).hexdigest()

    @property
    def workers(self) -> int:
        return self.train.workers

    def pictures(self) -> Iterator[torch.Tensor]:
        return (image for image, _ in chain.from_iterable(repeat(self.train)))

    def smallest_batch(self, batch_size: int) -> int:
        return batch_size

    def _loader(self, stream: Stream, batch_size: int) -> StreamLoader:
        return StreamLoader(
            replace(stream, batch_size=batch_size),
            batch_size,
            num_workers=stream.workers,
            pin_memory=self.context.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def train_loader(self, batch_size: int) -> StreamLoader:
        """Full batches of `batch_size`, equally many a process."""
        return self._loader(self.train, batch_size)

    def seek(self, loader: StreamLoader, epoch: int, start: int = 0) -> StreamLoader:
        """Sets a training loader to batch `start` of an epoch."""
        loader.dataset.epoch, loader.start = epoch, start
        key = np.random.SeedSequence([self.config.seed, epoch, self.context.rank])
        loader.generator.manual_seed(int(key.generate_state(1)[0]))  # from which timm's reader seeds its buffer
        return loader

    def val_loader(self, batch_size: int) -> StreamLoader:
        return self._loader(self.val, batch_size)


def open_data(config: DataConfig, context: Context, model: Preprocessing | None = None, trains: bool = True) -> Data:
    """The data set that --dataset names, of either kind."""
    return (Streams if names.is_stream(config.dataset) else Data)(config, context, model, trains)
