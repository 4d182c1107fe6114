"""Every data set of the table on tiny fixtures in exactly their layouts, and the batches that come of them."""

import hashlib
import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets as tv

import main
from datasets.loading import Data
from datasets.registry import SOURCES, build_split, count_classes
from tests.conftest import image_folder, write_images
from utils.configs import DataConfig, default_folder
from utils.distributed import Context
from utils.errors import FarError


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(root, monkeypatch, kind, folder, label, classes):
    folder = root / folder
    folder.mkdir(parents=True)
    for attribute, name in {"train_list": "train", "test_list": "test"}.items():
        data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, label: [0, 1, 2, 3]}))
        monkeypatch.setattr(kind, attribute, [[name, md5(folder / name)]])
    (folder / "meta").write_bytes(pickle.dumps({"names": [str(c) for c in range(classes)]}))
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "names", "md5": md5(folder / "meta")})


def flowers(root, monkeypatch):
    base = root / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 9):
        Image.new("RGB", (40, 40), (i * 30, 0, 0)).save(base / "jpg" / f"image_{i:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 4, 5, 102, 7, 8]])})
    savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6, 7]]})
    files = {k: (f, md5(base / f)) for k, f in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", {**tv.Flowers102._file_dict, **files})


def cars(root, monkeypatch):
    base = root / "stanford_cars"
    kind = [("fname", object), ("class", int)]
    for split, where in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        write_images(base / f"cars_{split}", 3)
        (base / where).parent.mkdir(parents=True, exist_ok=True)
        savemat(base / where, {"annotations": np.array([[(f"{i}.jpg", i + 1) for i in range(3)]], dtype=kind)})
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([[f"car {c}" for c in range(196)]], dtype=object)})


def inat(root, year, classes):
    names = []
    for c in range(classes):  # the archive holds every class's folder
        (root / year / "Plantae" / str(c)).mkdir(parents=True)
    for c in range(2):
        folder = root / year / "Plantae" / str(c)
        write_images(folder, 3)
        names += [f"train_val{year}/Plantae/{c}/{i}.jpg" for i in range(3)]
    for split, held in (("train", False), ("val", True)):
        images = [{"file_name": n} for n in names if ("2.jpg" in n) is held]
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images}))


def solar_cells(root, count=4):
    """elpv-dataset's layout: `count` cells of each type and probability."""
    (root / "images").mkdir()
    lines = []
    for kind in ("mono", "poly"):
        for probability in ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0"):
            for _ in range(count):
                name = f"images/cell{len(lines) + 1:04d}.png"
                Image.new("L", (30, 30), 7 * len(lines)).save(root / name)
                lines.append(f"{name}  {probability:<19} {kind}\n")
    (root / "labels.csv").write_text("".join(lines))


FIXTURES = {
    "FOLDER": (lambda root, mp: image_folder(root, classes=3), 12, 12, 3),
    "CIFAR10": (lambda root, mp: cifar(root, mp, tv.CIFAR10, "cifar-10-batches-py", "labels", 10), 4, 4, 10),
    "CIFAR100": (lambda root, mp: cifar(root, mp, tv.CIFAR100, "cifar-100-python", "fine_labels", 100), 4, 4, 100),
    "FLOWER": (flowers, 4, 3, 102),
    "CAR": (cars, 3, 3, 196),
    "INAT19": (lambda root, mp: inat(root, "2019", 1010), 4, 2, 1010),
    "IMAGES": (lambda root, mp: write_images(root, 12), 10, 2, None),
    "DIGITS": (lambda root, mp: None, 1437, 360, 10),
    "ELPV": (lambda root, mp: solar_cells(root), 24, 8, 4),
    "ELPV2": (lambda root, mp: solar_cells(root), 24, 8, 2),
}


@pytest.mark.parametrize("name", sorted(FIXTURES))
def test_each_data_set_reads_its_own_layout(name, tmp_path, monkeypatch):
    make, train_size, val_size, classes = FIXTURES[name]
    make(tmp_path, monkeypatch)
    train, val = (build_split(name, tmp_path, t) for t in (True, False))
    assert (len(train), len(val), count_classes(name, train)) == (train_size, val_size, classes)
    data = Data(DataConfig(name, tmp_path, 48, num_workers=0), Context())
    images, labels = next(iter(data.seek(data.train_loader(2), 0)))
    assert images.shape == (2, 3, 48, 48) and images.dtype == torch.float32 and labels.max() < (classes or 1)
    assert len(next(iter(data.val_loader(2)))[0]) == 2


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"DIGITS"}))
def test_a_missing_folder_says_what_was_looked_for_and_how_to_get_it(name, tmp_path):
    with pytest.raises(FarError, match="--data-path") as error:
        build_split(name, tmp_path / "nowhere", True)
    assert SOURCES[name].layout in str(error.value) and SOURCES[name].get in str(error.value)
    assert not any(tmp_path.iterdir())  # asking makes nothing


def test_class_folders_are_read_as_torchvision_reads_them(tmp_path):
    root, outside = image_folder(tmp_path / "data", classes=3, count=12), tmp_path / "outside"
    write_images(outside, 3)
    write_images(root / "train/class1/0/deep", 2)
    write_images(root / "train/class1/0deep", 2)
    (root / "train/class1/more").symlink_to(outside)
    (root / "train/class1/notes.txt").touch()
    (root / "train/class2/9.jpg").rename(root / "train/class2/9.JPG")
    found = build_split("FOLDER", root, True)
    assert list(zip(found.files, found.targets, strict=True)) == tv.ImageFolder(root / "train").samples
    (root / "train/class1/loop").symlink_to("..")
    with pytest.raises(FarError, match="class1/loop: a link back to a folder above it; remove the link"):
        build_split("FOLDER", root, True)


def test_inaturalists_species_may_be_taken_by_what_they_belong_to(tmp_path):
    inat(tmp_path, "2019", 1010)
    listing = tmp_path / "categories.json"
    listing.write_text(json.dumps([{"id": i, "name": f"s{i}", "family": "ba"[i % 2]} for i in range(1010)]))
    data = Data(DataConfig("INAT19", tmp_path, 32, num_workers=0, inat_category="family"), Context())
    assert data.class_names == ("a", "b")
    species, families = (build_split("INAT19", tmp_path, True, category=c) for c in ("name", "family"))
    assert [families[i][1] for i in range(4)] == [1 - species[i][1] % 2 for i in range(4)] == [1, 1, 0, 0]
    with pytest.raises(FarError, match=r"--inat-category genus: .*categories\.json"):
        build_split("INAT19", tmp_path, True, category="genus")
    with pytest.raises(FarError, match="--inat-category family: --dataset FOLDER has no such classes"):
        build_split("FOLDER", image_folder(tmp_path / "f"), True, category="family")


@pytest.mark.parametrize(("flag", "count"), [(None, 3), (5, 5)])
def test_a_model_may_know_more_classes_than_the_data_but_not_fewer(flag, count, tmp_path):
    image_folder(tmp_path, classes=3)
    data = Data(DataConfig("FOLDER", tmp_path, 48, num_workers=0, nb_classes=flag), Context())
    assert data.num_classes == count
    assert data.class_names == ("class0", "class1", "class2", "class 3", "class 4")[:count]
    with pytest.raises(FarError, match="--nb-classes 2: --dataset FOLDER has 3"):
        Data(DataConfig("FOLDER", tmp_path, 48, nb_classes=2), Context())


def test_digits_splits_are_disjoint_complete_and_stratified():
    train, val = (build_split("DIGITS", None, t) for t in (True, False))
    pixels = sorted(np.asarray(image).tobytes() for split in (train, val) for image in split.images)
    source = load_digits().images
    expected = sorted(np.repeat(np.round(i * 255 / 16).astype(np.uint8)[..., None], 3, 2).tobytes() for i in source)
    assert pixels == expected
    assert np.bincount(val.targets).min() >= 34


def test_solar_cells_are_split_once_and_classed_by_type_and_probability(tmp_path):
    solar_cells(tmp_path)
    four, two = ([build_split(name, tmp_path, t) for t in (True, False)] for name in ("ELPV", "ELPV2"))
    for a, b in zip(four, two, strict=True):
        assert a.files == b.files and two[0].classes == ["intact", "defective"]
        assert [f"{'mono' if k < 2 else 'poly'} {b.classes[k % 2]}" for k in a.targets] == [
            a.classes[k] for k in a.targets
        ]
        assert [k % 2 for k in a.targets] == b.targets
    places = {int(file.stem[4:]) - 1: k for data in four for file, k in zip(data.files, data.targets, strict=True)}
    assert [places[i] for i in range(32)] == [i // 8 for i in range(32)]  # 0 and 1/3 are intact, 2/3 and 1 defective
    assert np.bincount(four[1].targets).tolist() == [2, 2, 2, 2]
    image, _ = four[0][0]
    assert image.mode == "RGB" and image.getpixel((0, 0))[0] == 7 * (int(four[0].files[0].stem[4:]) - 1)


@pytest.mark.parametrize(
    ("name", "file", "damage", "said"),
    [
        ("INAT19", "train2019.json", "[]", "not a competition's list of images .*; fetch it again"),
        ("ELPV", "labels.csv", "images/a.png half mono", "not a line each of image, probability and type"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_1", "cut", "corrupted .* remove it"),
    ],
)
def test_a_damaged_file_of_a_data_set_is_named(name, file, damage, said, tmp_path):
    solar_cells(tmp_path)
    inat(tmp_path, "2019", 2)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / file).write_text(damage)
    with pytest.raises(FarError, match=f"{file.partition('/')[0]}: {said}"):
        build_split(name, tmp_path, True)


def test_a_package_that_ships_a_data_set_is_found_without_importing_it(tmp_path, monkeypatch, failure):
    words = "--mode teacher --dataset ELPV --scale Micro --dry-run".split()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "elpv_dataset" else find_spec(name))
    assert "pip install --no-deps -r requirements-real.txt" in failure(*words)
    monkeypatch.undo()
    package = tmp_path / "elpv_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no OpenCV here')")
    solar_cells(package / "data")
    monkeypatch.syspath_prepend(tmp_path)
    assert default_folder("ELPV") == default_folder("ELPV2") == package / "data"
    assert default_folder("FOLDER") == Path("data/FOLDER")
    assert main.main(words) == 0


@pytest.mark.skipif(not importlib.util.find_spec("elpv_dataset"), reason="elpv-dataset is not installed")
def test_the_published_solar_cells_are_all_there():
    train, val = (build_split("ELPV", default_folder("ELPV"), t) for t in (True, False))
    assert np.bincount(train.targets).tolist() == [529, 277, 823, 339]
    assert np.bincount(val.targets).tolist() == [176, 92, 275, 113]
    assert train[0][0].size == (300, 300) and not {*train.files} & {*val.files}
