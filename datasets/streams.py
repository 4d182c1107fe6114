"""Data sets that are read from front to back, by timm's readers: wds/NAME (WebDataset tars), tfds/NAME (TensorFlow's).

A sample has no number by which it could be asked for. So order and draws follow from (seed, epoch, process, loader
process, place in that one's order): other than with folders, they change with the number of both kinds of processes.
"""

import contextlib
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, islice, repeat
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from datasets.images import shown, to_rgb
from datasets.loading import Data, DataConfig, Loader
from datasets.registry import SOURCES, Source
from utils import names
from utils.distributed import Context
from utils.errors import FarError
from utils.preprocessing import Preprocessing
from utils.seeding import seeded


class Split(NamedTuple):
    """lengths: samples in each of the pieces (tars) that loader processes divide among themselves."""

    name: str
    lengths: Sequence[int]
    num_classes: int | None  # None: not told


def _tars(config: DataConfig, split: str) -> Split:
    """By _info.json, as timm writes and reads it. Raises FarError where that is not there, or a tar is not."""
    listing = config.root / "_info.json"
    try:
        info = json.loads(listing.read_text(encoding="utf-8"))
        told = info["splits"][split]
        tars, lengths = [config.root / name for name in told["filenames"]], told["shard_lengths"]
        told["name"]  # which timm reads too
        known = told.get("num_classes", info.get("num_classes"))
        if not (len(tars) == len(lengths) > 0 and min(lengths) > 0 and sum(lengths) == told["num_samples"]):
            raise ValueError("its filenames, shard_lengths and num_samples do not agree")
        if known is not None and not known > 0:
            raise ValueError(f"num_classes {known}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"--data-path {shown(listing)}: does not describe a split {split} ({type(error).__name__}: {error})"
        raise FarError(f"{where}; put the tars' _info.json there, as timm's data sets on the hub have it") from error
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise FarError(f"--data-path {shown(missing[0])}: not there, but {listing.name} names it; fetch it")
    return Split(split, lengths, known)


def _examples(config: DataConfig, split: str) -> Split:
    """By the files that tensorflow_datasets made before. Raises FarError where it did not."""
    try:
        reader = create_dataset(config.dataset, config.root, split=split).reader
    except (OSError, ValueError, KeyError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        where = f"--data-path {shown(config.root)}: no split {split} of {config.dataset} there ({reason})"
        raise FarError(f"{where}; make it with the command tfds build") from error
    return Split(split, (1,) * reader.num_samples, len(reader.class_to_idx) or None)


class Kind(NamedTuple):
    package: str
    install: str
    split: Callable[[DataConfig, str], Split]
    mode: str  # PIL's, which timm's reader makes of a picture; empty: as it is
    fewest: int  # loader processes with which timm's reader finds its part


KINDS = {
    "wds": Kind("webdataset", "webdataset", _tars, "", 0),
    "tfds": Kind("tensorflow_datasets", "tensorflow-cpu tensorflow-datasets", _examples, "RGB", 1),
}


def kind_of(config: DataConfig) -> Kind:
    return KINDS[config.dataset.partition("/")[0]]


def open_split(config: DataConfig, split: str) -> Split:
    """Raises FarError where the split is not there, or the package that reads it is not."""
    kind = kind_of(config)
    try:
        import_module(kind.package)
        return kind.split(config, split)
    except ImportError as error:
        where = f"--dataset {config.dataset}: needs the package {kind.package} ({error})"
        raise FarError(f"{where}; pip install {kind.install}") from error


class NoSkipping(logging.Filter):
    """timm's reader warns of what it cannot read and goes on; here this ends the run. Raises FarError."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if isinstance(error, FarError):  # webdataset catches it once on its way, and adds to its arguments
            raise FarError(error.args[0])
        raise FarError(f"{self.name}: cannot be read whole ({error or record.getMessage()}); mend or fetch its files")


@contextlib.contextmanager
def whole(where: str) -> Iterator[None]:
    """Lets timm's reader skip nothing within the block."""
    log, refusal = logging.getLogger("timm.data.readers.reader_wds"), NoSkipping(where)
    log.addFilter(refusal)
    try:
        yield
    finally:
        log.removeFilter(refusal)


@dataclass
class Stream(IterableDataset):
    """A split as the loader processes of one process read it: pictures, transformed, and their labels."""

    config: DataConfig
    split: Split
    transform: Callable
    num_classes: int
    rank: int
    world: int
    batch_size: int = 1
    epoch: int = 0
    start: int = 0  # batches of the epoch that are left out, in whole rounds of the loader processes

    def __len__(self) -> int:
        """Samples of the split, over all processes."""
        return sum(self.split.lengths)

    @property
    def where(self) -> str:
        return f"--data-path {shown(self.config.root)}: split {self.split.name}"

    @property
    def pieces(self) -> int:
        """The most loader processes that find something to read."""
        return math.ceil(len(self.split.lengths) / self.world)

    @property
    def workers(self) -> int:
        """Loader processes. Not by this machine's cores: what is read when must not depend on them."""
        return max(kind_of(self.config).fewest, min(self.config.num_workers, self.pieces))

    def _reader(self, is_training: bool):
        """timm's reader, new for every epoch: its shuffles have no other past."""
        seed = np.random.SeedSequence([self.config.seed, self.epoch]).generate_state(1)[0] >> 1
        kwargs = {"split": self.split.name, "is_training": is_training, "batch_size": self.batch_size}
        mode = kind_of(self.config).mode
        root = self.config.root.absolute()  # no name that webdataset would take for an address
        data = create_dataset(self.config.dataset, root, seed=int(seed), input_img_mode=mode, **kwargs)
        data.reader.dist_rank, data.reader.dist_num_replicas = self.rank, self.world
        return data.reader

    def _samples(self, reader) -> Iterator[tuple[Image.Image, int]]:
        """Raises FarError where one cannot be read, or is of no class of the model."""
        with whole(self.where):
            for image, label in reader:
                if label not in range(self.num_classes):
                    wrong = f"{self.where}: holds a label {label}, not of 0 to {self.num_classes - 1}"
                    raise FarError(f"{wrong}; mend it or --nb-classes")
                yield self._rgb(image), label

    def _rgb(self, image: Image.Image) -> Image.Image:
        try:
            return to_rgb(image)
        except ValueError as error:
            raise FarError(f"{self.where}: holds an unreadable picture ({error}); mend it") from error


def turn() -> tuple[int, int]:
    """Which of how many loader processes this is; a process without any is its own only one."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


class Training(Stream):
    """Shuffled by shards, then within a buffer. Each loader process fills whole batches, beginning again where its
    shards end before the others': all processes take equally many steps."""

    @property
    def pieces(self) -> int:
        return len(self.split.lengths) // self.world

    def steps(self, batch_size: int) -> int:
        """Batches an epoch of a process, as timm counts them."""
        workers = max(1, self.workers)
        return math.ceil(math.ceil(len(self) / (self.world * workers)) / batch_size) * workers

    def __iter__(self):
        worker, workers = turn()
        samples = enumerate(self._samples(self._reader(True)))
        for place, (image, label) in islice(samples, self.start // workers * self.batch_size, None):
            with seeded(self.config.seed, self.epoch, self.rank, worker, place):
                view = self.transform(image)
            yield view, label


class Evaluation(Stream):
    """Every sample once over all processes, none twice, in the split's order."""

    def held(self, worker: int, workers: int) -> int:
        """Samples of one loader process: every so many-th piece is its own."""
        return sum(self.split.lengths[self.rank * workers + worker :: self.world * workers])

    def steps(self, batch_size: int) -> int:
        workers = max(1, self.workers)
        return sum(math.ceil(self.held(worker, workers) / batch_size) for worker in range(workers))

    def __iter__(self):
        worker, workers = turn()
        reader = self._reader(False)
        reader._lazy_init()  # which takes this process's own part; to one that seems alone nothing is added to it
        reader.dist_num_replicas = 1
        found = 0
        for image, label in self._samples(reader):
            found += 1
            yield self.transform(image), label
        if found != (told := self.held(worker, workers)):
            raise FarError(f"{self.where}: holds {found} pictures where it tells of {told}; fetch its files again")


class StreamLoader(Loader):
    """Batches of a stream from its `start` on. Its loader processes take turns: whole rounds are left out by them, what
    is left here."""

    def __len__(self) -> int:
        return self.dataset.steps(self.batch_size)

    def __iter__(self):
        yield from islice(super().__iter__(), self.dataset.start % max(1, self.num_workers), None)


class Streams(Data):
    """Both splits of a stream, named train and validation. tfds/NAME goes the same way, but no test reads one."""

    def _open(self, trains: bool) -> tuple[Source, Split | None, Split, int | None, tuple[str, ...]]:
        config = self.config
        for flag, given in (
            ("--holdout", config.holdout),
            ("--train-subset", config.train_subset < 1),
            ("--repeated-aug", config.repeated_aug),
            ("--inat-category", config.inat_category != "name"),
            ("--download", config.download),
        ):
            if given:
                where = f"{flag}: not with --dataset {config.dataset}, which is read from front to back"
                raise FarError(f"{where}; leave it out, or take class folders (--dataset FOLDER)")
        train, val = open_split(config, "train") if trains else None, open_split(config, "validation")
        known = val if train is None else train
        if not (known.num_classes or config.nb_classes):
            raise FarError(f"--dataset {config.dataset}: does not tell its number of classes; name --nb-classes")
        if train and len(train.lengths) < self.context.world:
            where = f"--nproc_per_node: {self.context.world} processes but {len(train.lengths)} training tars"
            raise FarError(f"{where}; start fewer processes, or write more tars")
        self.splits = [split for split in (train, val) if split]
        return SOURCES["FOLDER"], train, val, known.num_classes, ()

    def fingerprint(self) -> str:
        """Of the lengths of the splits' tars, which no data set that is read from front to back goes without."""
        return hashlib.sha256(repr([list(split.lengths) for split in self.splits]).encode()).hexdigest()

    def _views(self, train: Split | None, val: Split, augment, plain) -> tuple[Training | None, Evaluation]:
        given = self.num_classes, self.context.rank, self.context.world
        training = train and Training(self.config, train, augment, *given)
        return training, Evaluation(self.config, val, plain, *given)

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

    def at(self, loader: StreamLoader, epoch: int, start: int = 0) -> StreamLoader:
        loader.dataset.epoch, loader.dataset.start = epoch, start
        key = np.random.SeedSequence([self.config.seed, epoch, self.context.rank])
        loader.generator.manual_seed(int(key.generate_state(1)[0]))
        return loader

    def val_loader(self, batch_size: int) -> StreamLoader:
        return self._loader(self.val, batch_size)


def open_data(config: DataConfig, context: Context, own: Preprocessing | None = None, trains: bool = True) -> Data:
    """The data set of whichever kind."""
    return (Streams if names.is_stream(config.dataset) else Data)(config, context, own, trains)
