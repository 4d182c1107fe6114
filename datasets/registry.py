"""Every data set FAR knows, as one table: how to build a split, how many classes, where to get it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets as tv

from datasets.classes import Relabelled, imagenet_names
from datasets.elpv import SolarCells
from datasets.images import ImageFiles, is_leftover, read_image, walk
from utils.errors import FarError

Build = Callable[[Path, bool, bool], Dataset]  # (root, train, download) -> data set of (PIL image, label)


@dataclass(frozen=True)
class Source:
    """A data set that --dataset names.

    num_classes: None where they are counted. layout: what is looked for in --data-path. get: how to obtain it. flip:
    mirrored images keep their class. labelled: its labels mean something.
    """

    build: Build
    num_classes: int | None
    layout: str
    get: str
    flip: bool = True
    can_download: bool = False
    labelled: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class Digits(Dataset):
    """The 1,797 real handwritten digits inside scikit-learn (UCI, 8 x 8, 16 greys), fixed split 1,437 / 360, RGB."""

    def __init__(self, train: bool):
        digits = load_digits()
        self.classes = [str(digit) for digit in digits.target_names]
        split = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
        chosen = np.sort(split[0 if train else 1])
        grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(image).convert("RGB") for image in grey]
        self.targets = digits.target[chosen].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], self.targets[index]


def photographs() -> dict[str, Image.Image]:
    """The two photographs that come with scikit-learn, by name: a temple in China, a flower."""
    bunch = load_sample_images()
    return {Path(name).stem: Image.fromarray(image) for name, image in zip(bunch.filenames, bunch.images, strict=True)}


class Folder(ImageFiles):
    """A folder of images a class, at any depth, in torchvision's order. skipped: paths of what is no picture."""

    def __init__(self, root: Path):
        self.skipped: list[str] = []
        self.classes: list[str] = []
        for path in root.iterdir():
            if path.is_dir() and not is_leftover(path.name):
                self.classes.append(path.name)
            else:
                self.skipped.append(str(path))
        if not self.classes:
            raise FarError(f"--data-path {root}: holds no class folders; make one folder of images a class")
        self.classes.sort()
        files, targets = [], []
        for label, name in enumerate(self.classes):
            inside = sorted(walk(root / name, self.skipped), key=os.path.split)
            if not inside:
                raise FarError(f"--data-path {root / name}: an empty class folder; add images or remove it")
            files += inside
            targets += [label] * len(inside)
        super().__init__(root, files, targets)


class UnlabelledImages(ImageFiles):
    """Images without classes, in or below a folder. By name, every tenth evaluates and the others train."""

    def __init__(self, root: Path, train: bool):
        self.skipped: list[str] = []
        files = sorted(map(Path, walk(root, self.skipped)))
        super().__init__(root, [file for k, file in enumerate(files) if (k % 10 > 0) == train])


def flowers(root: Path, train: bool, download: bool) -> Dataset:
    """As in DeiT's transfer experiments: the 1,020 + 1,020 labelled images train, the 6,149 test images evaluate."""
    splits = ("train", "val") if train else ("test",)
    parts = [tv.Flowers102(root, split=split, download=download, loader=read_image) for split in splits]
    joined = ConcatDataset(parts)
    joined.classes = parts[0].classes
    return joined


def inaturalist(year: str, root: Path, train: bool, download: bool) -> Dataset:
    """The images of a year's archive that the competition's json file of the split lists."""
    folder, listing = root / year, root / f"{'train' if train else 'val'}{year}.json"
    if not download and not folder.is_dir():
        raise FileNotFoundError(folder)  # torchvision would make the root
    data = tv.INaturalist(root, version=year, download=download and not folder.exists(), loader=read_image)
    if not listing.is_file():
        raise FileNotFoundError(listing)
    try:
        images = json.loads(listing.read_text(encoding="utf-8"))["images"]
        listed = {"/".join(Path(image["file_name"]).parts[-2:]) for image in images}  # <species>/<file>
    except (ValueError, KeyError, TypeError) as error:
        where = f"--data-path {listing}: not a competition's list of images"
        raise FarError(f"{where} ({type(error).__name__}: {error}); fetch it again") from error
    names = [f"{Path(data.all_categories[category]).name}/{file}" for category, file in data.index]
    split = Subset(data, [i for i, name in enumerate(names) if name in listed])
    if not len(split):
        raise FarError(f"--data-path {listing}: names no image under {folder}; unpack the images of {year} there")
    split.classes = data.all_categories
    return split


def by_category(name: str, root: Path, data: Dataset, category: str) -> Relabelled:
    """iNaturalist's species by kingdom, family, ...: as the competition's categories.json says. Raises FarError."""
    flag, listing = f"--inat-category {category}", root / "categories.json"
    if name not in ("INAT18", "INAT19"):
        raise FarError(f"{flag}: --dataset {name} has no such classes, INAT18 and INAT19 have; leave it out")
    try:
        known = {entry["id"]: entry[category] for entry in json.loads(listing.read_text(encoding="utf-8"))}
        groups = [known[int(Path(species).name)] for species in data.classes]
        classes = sorted(set(groups))
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"{flag}: {listing} does not give every species' ({type(error).__name__}: {error})"
        raise FarError(f"{where}; put the competition's categories.json of this year there") from error
    grouped = Relabelled(data, [classes.index(group) for group in groups])
    grouped.classes = classes
    return grouped


def inaturalist_source(year: str, num_classes: int) -> Source:
    return Source(
        partial(inaturalist, year),
        num_classes,
        f"{year}/<kingdom>/<id>/*.jpg, train{year}.json and val{year}.json",
        f"add --download for the images, and put the {year} competition's train/val json files beside them",
        can_download=True,
    )


IMNET = Source(
    lambda root, train, download: Folder(root / ("train" if train else "val")),
    1000,
    "train/<class>/*.jpg and val/<class>/*.jpg",
    "unpack ImageNet-1k's ILSVRC2012 archives, one folder a class",
)
CIFAR10 = Source(
    lambda root, train, download: tv.CIFAR10(root, train, download=download),
    10,
    "cifar-10-batches-py/",
    "add --download",
    can_download=True,
)
ELPV = Source(
    lambda root, train, download: SolarCells(root, train, types=True),
    4,
    "labels.csv and images/*.png",
    "pip install --no-deps -r requirements-real.txt, and leave --data-path out",
)
SOURCES: dict[str, Source] = {
    "IMNET": IMNET,
    "CIFAR10": CIFAR10,
    "CIFAR100": replace(
        CIFAR10,
        build=lambda root, train, download: tv.CIFAR100(root, train, download=download),
        num_classes=100,
        layout="cifar-100-python/",
    ),
    "FLOWER": Source(
        flowers, 102, "flowers-102/jpg, imagelabels.mat and setid.mat", "add --download", can_download=True
    ),
    "CAR": Source(
        lambda root, train, _: tv.StanfordCars(root, split="train" if train else "test", loader=read_image),
        196,
        "stanford_cars/devkit, cars_train, cars_test and cars_test_annos_withlabels.mat",
        "torchvision can no longer download it; get the Stanford Cars archives and unpack them there",
    ),
    "INAT18": inaturalist_source("2018", 8142),
    "INAT19": inaturalist_source("2019", 1010),
    "FOLDER": replace(IMNET, num_classes=None, get="make one folder of images a class"),
    "IMAGES": Source(
        lambda root, train, download: UnlabelledImages(root, train),
        None,
        "*.jpg, at any depth",
        "put pictures there, as many as there are",
        labelled=False,
    ),
    "DIGITS": Source(
        lambda root, train, download: Digits(train),
        10,
        "nothing",
        "ships with scikit-learn",
        flip=False,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    ),
    "ELPV": ELPV,
    "ELPV2": replace(ELPV, build=lambda root, train, download: SolarCells(root, train, types=False), num_classes=2),
}


def build_split(name: str, root: Path, train: bool, download: bool = False, category: str = "name") -> Dataset:
    """A split of (PIL image, label). Raises FarError with what was looked for and how to get it.

    category: iNaturalist's classes, one of utils.names.INAT_CATEGORIES.
    """
    source = SOURCES[name]
    if download and not source.can_download:
        raise FarError(f"--download: not possible for {name}; {source.get}")
    try:
        data = source.build(root, train, download)
    except (FileNotFoundError, RuntimeError, NotADirectoryError, KeyError, ValueError) as error:
        where = f"--data-path {root}: {name} not found there"
        if "corrupted" in str(error) and (folder := root / source.layout.partition("/")[0]).exists():
            where = f"--data-path {folder}: corrupted (a file's checksum is wrong); remove it"
        raise FarError(f"{where}; looked for {source.layout}; {source.get}") from error
    except OSError as error:
        flag = "--download" if download else "--data-path"
        where = f"{flag} {error.filename or root}: cannot be read ({error.strerror or error})"
        raise FarError(f"{where}; mend this first") from error
    classes = getattr(data, "classes", None)  # absent where the source's own checksums vouch for the count
    if source.num_classes and classes is not None and len(classes) != source.num_classes:
        where = f"--data-path {root}: {len(classes)} classes, but {name} has {source.num_classes}"
        raise FarError(f"{where}; complete it, or name a subset or another set --dataset FOLDER")
    return data if category == "name" else by_category(name, root, data, category)


def count_classes(name: str, data: Dataset) -> int | None:
    """The classes of a split of `build_split`; None where there are no labels."""
    source = SOURCES[name]
    return len(getattr(data, "classes", ())) or source.num_classes if source.labelled else None


def class_names(name: str, data: Dataset) -> tuple[str, ...]:
    """The classes of a split by name, in the order of its labels; ImageNet's in words. Empty where there are none."""
    names = tuple(map(str, getattr(data, "classes", ()))) if SOURCES[name].labelled else ()
    return imagenet_names() if list(names) == ImageNetInfo().label_names() else names
