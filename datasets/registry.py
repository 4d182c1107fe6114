"""Every data set FAR knows, as one table: how to build a split, how many classes, where to get it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets as tv

from utils.errors import FarError

Build = Callable[[Path, bool, bool], Dataset]  # (root, train, download) -> data set of (PIL image, label)


@dataclass(frozen=True)
class Source:
    """`layout` says what is looked for under --data-path, `get` how to obtain it; `flip`: mirror images still mean the same."""

    build: Build
    num_classes: int | None
    layout: str
    get: str
    flip: bool = True
    can_download: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class Digits(Dataset):
    """The 1,797 real handwritten digits inside scikit-learn (UCI, 8 x 8 pixels, 16 greys), fixed split 1,437 / 360, RGB."""

    def __init__(self, train: bool):
        digits = load_digits()
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


def read_image(path: str) -> Image.Image:
    """An RGB image; raises FarError naming a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise FarError(f"{path}: not a readable image ({type(error).__name__}); mend or remove the file") from error


def _folder(root: Path, train: bool, download: bool) -> Dataset:
    split = root / ("train" if train else "val")
    if not split.is_dir():
        raise FileNotFoundError(split)
    folders = sorted(p for p in split.iterdir() if p.is_dir())
    if not folders:
        raise FarError(f"--data-path {split}: holds no class folders; make one folder of images a class")
    for folder in folders:
        if not any(p.suffix.lower() in tv.folder.IMG_EXTENSIONS for p in folder.rglob("*")):
            raise FarError(f"--data-path {folder}: an empty class folder; add images or remove it")
    data = tv.ImageFolder(split, loader=read_image)
    other = root / ("val" if train else "train")
    if other.is_dir() and (names := sorted(p.name for p in other.iterdir() if p.is_dir())) != data.classes:
        odd = sorted(set(names) ^ set(data.classes))[0]
        raise FarError(f"--data-path {root}: class {odd} is in only one of train/ and val/; make the class folders agree")
    return data


def _flowers(root: Path, train: bool, download: bool) -> Dataset:
    # As in DeiT's transfer experiments: the 1,020 + 1,020 labelled images train, the 6,149 test images evaluate.
    parts = [tv.Flowers102(root, split=s, download=download, loader=read_image) for s in (("train", "val") if train else ("test",))]
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _inaturalist(year: str) -> Build:
    def build(root: Path, train: bool, download: bool) -> Dataset:
        data = tv.INaturalist(root, version=year, download=download and not (root / year).exists(), loader=read_image)
        listing = root / f"{'train' if train else 'val'}{year}.json"
        listed = json.loads(listing.read_text())["images"]
        wanted = {"/".join(Path(image["file_name"]).parts[-2:]) for image in listed}
        names = [f"{Path(data.all_categories[category]).name}/{file}" for category, file in data.index]
        chosen = [i for i, name in enumerate(names) if name in wanted]
        if not chosen:
            raise FarError(f"--data-path {listing}: names no image under {root / year}; unpack the images of {year} there")
        return Subset(data, chosen)

    return build


def _folder_source(num_classes: int | None, get: str) -> Source:
    return Source(_folder, num_classes, "train/<class>/*.jpg and val/<class>/*.jpg", get)


def _cifar(kind: type, num_classes: int, layout: str) -> Source:
    return Source(
        lambda root, train, download: kind(root, train=train, download=download),
        num_classes, layout, "add --download", can_download=True,
    )  # fmt: skip


def _inat_source(year: str, num_classes: int) -> Source:
    return Source(
        _inaturalist(year), num_classes, f"{year}/<kingdom>/<id>/*.jpg, train{year}.json and val{year}.json",
        f"add --download for the images, and put the {year} competition's train/val json files beside them",
        can_download=True,
    )  # fmt: skip


SOURCES: dict[str, Source] = {
    "IMNET": _folder_source(1000, "unpack ImageNet-1k's ILSVRC2012 archives, one folder a class"),
    "CIFAR10": _cifar(tv.CIFAR10, 10, "cifar-10-batches-py/"),
    "CIFAR100": _cifar(tv.CIFAR100, 100, "cifar-100-python/"),
    "FLOWER": Source(_flowers, 102, "flowers-102/jpg, imagelabels.mat and setid.mat", "add --download", can_download=True),
    "CAR": Source(
        lambda root, train, download: tv.StanfordCars(root, split="train" if train else "test", loader=read_image), 196,
        "stanford_cars/devkit, cars_train, cars_test and cars_test_annos_withlabels.mat",
        "torchvision can no longer download it; get the Stanford Cars archives and unpack them there",
    ),
    "INAT18": _inat_source("2018", 8142),
    "INAT19": _inat_source("2019", 1010),
    "FOLDER": _folder_source(None, "make one folder of images a class"),
    "DIGITS": Source(
        lambda root, train, download: Digits(train), 10, "nothing", "ships with scikit-learn",
        flip=False, mean=(0.5,) * 3, std=(0.5,) * 3,
    ),
}  # fmt: skip


def build_split(name: str, root: Path, train: bool, download: bool = False) -> Dataset:
    """A split of (PIL image, label). Raises FarError with what was looked for and how to get it."""
    if name not in SOURCES:
        raise FarError(f"--dataset {name}: unknown; choose from {', '.join(SOURCES)}")
    source = SOURCES[name]
    if download and not source.can_download:
        raise FarError(f"--download: not possible for {name}; {source.get}")
    try:
        return source.build(root, train, download)
    except (FileNotFoundError, RuntimeError, NotADirectoryError, KeyError, ValueError) as error:
        raise FarError(f"--data-path {root}: {name} not found there; looked for {source.layout}; {source.get}") from error


def count_classes(name: str, data: Dataset) -> int:
    """The table's class count, or for FOLDER the number of class folders."""
    return SOURCES[name].num_classes or len(data.classes)
