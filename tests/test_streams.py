"""Data sets read from front to back: each sample once, an order that can be gone on with, errors of one line."""

import io
import json
import os
import re
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import visualization
from datasets.images import read_image
from datasets.loading import DataConfig
from datasets.registry import Digits
from datasets.streams import KINDS, open_data
from engine.activations import BATCHES, first_batches
from engine.train import Trainer
from tests.conftest import launch, torchrun
from tests.faults import assert_equal
from utils import names
from utils.distributed import Context
from utils.errors import FarError
from utils.script import run_script

PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}
TRAIN, VALIDATION = (14, 14, 12), (11, 9)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, name: str, lengths: tuple[int, ...], first: int, form: str = "png") -> dict:
    """Tars of real digits from number `first` on, as WebDataset has them; returns their part of _info.json."""
    digits, files = Digits(True), [f"digits-{name}-{k:04}.tar" for k in range(len(lengths))]
    for file, length in zip(files, lengths, strict=True):
        with tarfile.open(root / file, "w") as tar:
            for i in range(first, first + length):
                image, content = digits[i][0], io.BytesIO()
                image.save(content, form)
                add(tar, f"{i:05}.{form}", content.getvalue())
                add(tar, f"{i:05}.cls", str(digits[i][1]).encode())
        first += length
    return {"name": name, "filenames": files, "shard_lengths": list(lengths), "num_samples": sum(lengths)}


def write_tars(root: Path, train=TRAIN, validation=VALIDATION, **info) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": write_shards(root, "train", train, 0),
        "validation": write_shards(root, "validation", validation, 100),
    }
    (root / "_info.json").write_text(json.dumps({"num_classes": 10, "splits": splits, **info}))
    return root


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


def stream(root, rank=0, world=1, **kwargs):
    flags = {**PLAIN, "num_workers": 0, "seed": 0, **kwargs}
    return open_data(DataConfig("wds/digits", root, 32, **flags), Context(rank, world))


def numbers(images: torch.Tensor, transform) -> list[int]:
    """Which digits of the training split these are, (B, 3, S, S)."""
    digits = Digits(True)
    known = torch.stack([transform(digits[i][0]) for i in range(130)])
    return torch.cdist(images.flatten(1), known.flatten(1)).argmin(1).tolist()


def batches(data, epoch=0, size=4, start=0):
    return [(x.clone(), y.clone()) for x, y in data.at(data.train_loader(size), epoch, start)]


def order(data, epoch=0, size=4, start=0):
    """The numbers of an epoch's samples, where nothing is augmented."""
    data.train.transform = data.val.transform
    return numbers(torch.cat([x for x, _ in batches(data, epoch, size, start)]), data.val.transform)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_each_picture_once_whatever_the_processes(tars, world, workers):
    found, digits = [], Digits(True)
    for rank in range(world):
        data = stream(tars, rank, world, num_workers=workers)
        loader = data.val_loader(4)
        got = list(loader)
        assert len(got) == len(loader)
        for images, labels in got:
            seen = numbers(images, data.val.transform)
            assert [digits[i][1] for i in seen] == labels.tolist()
            found += seen
    assert sorted(found) == list(range(100, 120))
    assert len(data.val) == 20 and len(data.train) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_training_order_follows_seed_and_epoch_and_can_be_gone_on_with(tars, workers):
    first = order(stream(tars, num_workers=workers))
    data = stream(tars, num_workers=workers)
    other = order(data, epoch=1)
    assert order(data) == first == order(stream(tars, num_workers=workers))  # whatever was read before
    assert len({tuple(o) for o in (first, other, order(stream(tars, num_workers=workers, seed=1)), sorted(first))}) == 4
    loader = data.train_loader(4)
    for epoch, expected in ((1, other), (0, first), (1, other)):  # one loader for all epochs, as a training has it
        images = torch.cat([x for x, _ in data.at(loader, epoch)])
        assert numbers(images, data.val.transform) == expected
    for start in range(1, 10):
        assert order(data, start=start) == first[4 * start :]
    assert batches(data, start=10) == []  # an epoch that is done but for its evaluation


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1)])
def test_equal_shards_train_on_each_sample_once_an_epoch(tmp_path, world, workers):
    root = write_tars(tmp_path, train=(10, 10, 10, 10))
    parts = [order(stream(root, rank, world, num_workers=workers), size=5) for rank in range(world)]
    assert {len(part) for part in parts} == {40 // world} and sorted(sum(parts, [])) == list(range(40))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (1, 8), (2, 8), (3, 0)])
@pytest.mark.parametrize("size", [3, 64])
def test_processes_take_equally_many_full_batches_of_their_own(tars, world, workers, size):
    parts, lengths = [], set()
    for rank in range(world):
        data = stream(tars, rank, world, num_workers=workers)
        loader = data.train_loader(size)
        assert data.smallest_batch(size) == size and loader.num_workers == min(workers, 3 // world)
        got = batches(data, 0, size)
        lengths.add(len(loader))
        assert {len(x) for x, _ in got} == {size} and len(got) == len(loader)
        parts.append(set(order(data, 0, size)))
    assert len(lengths) == 1
    assert all(not a & b for a in parts for b in parts if a is not b)


def test_no_two_views_of_a_picture_are_the_same_and_each_follows_from_its_place(tmp_path):
    root = write_tars(tmp_path, train=(4, 4))
    for file in root.glob("digits-train-*"):  # eight times the same digit
        with tarfile.open(root / "digits-validation-0000.tar") as source:
            content = source.extractfile("00100.png").read()
        with tarfile.open(file, "w") as tar:
            for i in range(4):
                add(tar, f"{file.stem}{i}.png", content)
                add(tar, f"{file.stem}{i}.cls", b"0")

    def views(epoch, rank, world, seed=0, start=0):
        data = stream(root, rank, world, num_workers=2, seed=seed, reprob=1.0)
        return [x.numpy().tobytes() for images, _ in batches(data, epoch, 2, start) for x in images]

    whole = [*views(0, 0, 1), *views(1, 0, 1), *views(0, 0, 2), *views(0, 1, 2), *views(0, 0, 1, seed=1)]
    assert len(whole) == 8 + 8 + 4 + 4 + 8
    # With two processes, rank 0's loader process 0 stands where the single process's stands, and draws what it draws.
    assert len(set(whole)) == len(whole) - 4 and views(0, 0, 2) == whole[:2] + whole[4:6]
    assert views(1, 0, 1, start=1) == whole[10:16] and views(1, 0, 1, start=3) == whole[14:16]


@pytest.mark.parametrize("depth", ["I;16", "RGBA", "L"])
def test_a_picture_is_read_as_the_same_file_in_a_folder(tmp_path, depth):
    rng = np.random.default_rng(0)
    if depth == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (32, 32), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (32, 32, 4), dtype=np.uint8), "RGBA").convert(depth)
    image.save(tmp_path / "a.png")
    root = write_tars(tmp_path / "tars", validation=(1,))
    with tarfile.open(root / "digits-validation-0000.tar", "w") as tar:
        add(tar, "a.png", (tmp_path / "a.png").read_bytes())
        add(tar, "a.cls", b"3")
    data = stream(root)
    ((images, labels),) = list(data.val_loader(2))
    assert torch.equal(images[0], data.val.transform(read_image(tmp_path / "a.png"))) and labels.tolist() == [3]


# ---- through the scripts

TEACH = "--mode teacher --scale Micro --dataset wds/x --batch-size 4 --num-workers 2 --epochs 2 --mixup 0.8".split()


def test_a_training_that_stops_within_an_epoch_goes_on_bit_equal(tars, tmp_path, monkeypatch, failure):
    monkeypatch.chdir(tmp_path)
    argv = [*TEACH, "--data-path", str(tars), "--output-dir"]
    assert main.main([*argv, "whole"]) == 0
    log = [json.loads(line) for line in Path("whole/steps.jsonl").read_text().splitlines()]
    assert len(log) == 20 and json.loads(Path("whole/result.json").read_text())["images"] == 20

    update, calls = Trainer._update, []

    def stop_at_the_fifteenth(self, number):
        update(self, number)
        calls.append(number)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", stop_at_the_fifteenth)
        assert run_script(main.main, [*argv, "run"]) == 0
    assert len(calls) == 15 and not Path("run/result.json").exists()
    line = failure(*argv, "run", "--resume", "--num-workers", "1")
    assert "--num-workers 2, not 1" in line
    assert main.main([*argv, "run", "--resume"]) == 0
    assert_equal(Path("run"), Path("whole"))


def test_two_processes_train_and_evaluate(tars, tmp_path):
    argv = [*TEACH[:-4], "--epochs", "1", "--data-path", str(tars), "--output-dir", "run"]
    done = launch(*torchrun(*argv), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["images"] == 20


def test_a_plan_and_what_prune_reads_know_streams(tars, capsys):
    assert main.main([*TEACH[:-2], "--data-path", str(tars), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"wds/x in {tars}: 40 training, 20 evaluation images, 10 classes" in said
    assert "2 epochs of 10 updates" in said and "2 of them" in said
    images = list(first_batches(stream(tars), 4, Context()))
    assert len(images) == BATCHES and images[0].shape == (4, 3, 32, 32)


def test_the_number_of_classes_is_told_or_named(tmp_path):
    root = write_tars(tmp_path, num_classes=None)
    with pytest.raises(FarError, match="--dataset wds/digits: does not tell its number of classes; name --nb-classes"):
        stream(root)
    assert stream(root, nb_classes=12).num_classes == 12
    root = write_tars(tmp_path)
    assert stream(root).num_classes == 10 and stream(root).class_names == ()
    with pytest.raises(FarError, match="--nb-classes 9: --dataset wds/digits has 10"):
        stream(root, nb_classes=9)


def test_the_parsers_kinds_are_those_that_are_read():
    assert tuple(KINDS) == names.STREAMS


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", ["cut", "shorter", "picture", "no label", "label"])
def test_what_cannot_be_read_is_one_line_and_no_wrong_number(tmp_path, damage, split):
    root = write_tars(tmp_path)
    path = root / f"digits-{split}-0001.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: 2 * 2048 + 600])  # within the third picture
    else:
        with tarfile.open(path, "w") as tar:
            for name, content in members[: -2 if damage == "shorter" else None]:
                if damage == "picture" and name == members[4][0]:
                    content = content[: len(content) // 2]
                if damage == "label" and name == members[5][0]:
                    content = b"10"
                if damage != "no label" or name != members[5][0]:
                    add(tar, name, content)
    data = stream(root)
    with pytest.raises(FarError) as caught:
        list(data.at(data.train_loader(4), 0) if split == "train" else data.val_loader(4))
        assert (damage, split) == ("shorter", "train")  # a whole tar: its other samples come oftener
        raise FarError(f"--data-path {root}: split {split}")
    assert str(caught.value).startswith(f"--data-path {root}: split {split}")
    assert str(caught.value).count("--data-path") == 1


def test_mistakes_are_one_line_and_nothing_is_written(tars, far, tmp_path, monkeypatch, failure):
    monkeypatch.chdir(tmp_path)
    lost = write_tars(tmp_path / "lost")
    (lost / "digits-validation-0001.tar").unlink()
    teach = [*TEACH, "--output-dir", "out"]
    here = [*teach, "--data-path", tars]
    before = sorted(p.name for p in tmp_path.iterdir())
    for argv, expected in (
        ([*teach, "--data-path", "nowhere"], "--data-path nowhere/_info.json: .*put the tars' _info.json there"),
        (teach, "--data-path data/wds/x/_info.json: "),
        ([*teach, "--data-path", lost], "lost/digits-validation-0001.tar: not there, but _info.json names it"),
        ([*here, "--holdout", "0.1"], "--holdout: not with --dataset wds/x"),
        ([*here, "--train-subset", "0.5"], "--train-subset: not with --dataset wds/x"),
        ([*here, "--repeated-aug"], "--repeated-aug: not with --dataset wds/x"),
        ([*here, "--download"], "--download: not with --dataset wds/x"),
        ([*here, "--inat-category", "genus"], "--inat-category: not with --dataset wds/x"),
        ([*here, "--dataset", "hfds/mnist"], "--dataset: hfds/mnist: .* take FOLDER, or .* take wds/NAME"),
        ([*here, "--dataset", "wds/"], "--dataset: wds/ is none of IMNET, .*, nor wds/NAME or tfds/NAME"),
        ([*here, "--dataset", "torch/cifar10"], "--dataset: torch/cifar10 is none of IMNET, "),
    ):
        assert re.search(expected, failure(*argv)), argv
    assert "--dataset" in failure("--dataset", "wds/x", script=visualization.main)
    for package, name in (("webdataset", "wds/x"), ("tensorflow_datasets", "tfds/mnist")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            line = failure(*here, "--dataset", name)
        assert f"--dataset {name}: needs the package {package} " in line and "; pip install " in line
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda info: info.pop("splits"),
        lambda info: info["splits"].pop("validation"),
        lambda info: info["splits"]["train"].pop("name"),
        lambda info: info["splits"]["train"].update(num_samples=41),
        lambda info: info["splits"]["train"].update(shard_lengths=[40]),
        lambda info: info["splits"]["train"].update(filenames=[], shard_lengths=[], num_samples=0),
        lambda info: info["splits"]["train"].update(shard_lengths="abc"),
        lambda info: info["splits"].update(train=3),
        lambda info: info.update(num_classes=0),
        lambda info: info.update(num_classes="ten"),
    ],
)
def test_a_description_that_is_none_is_one_line(damage, tmp_path):
    root = write_tars(tmp_path)
    info = json.loads((root / "_info.json").read_text())
    damage(info)
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(FarError, match=f"^--data-path {root}/_info.json: does not describe a split (train|validation)"):
        stream(root)


def test_more_processes_than_tars_are_refused(tars):
    with pytest.raises(FarError, match="--nproc_per_node: 4 processes but 3 training tars"):
        stream(tars, 0, 4)


def test_eval_names_the_folder_whose_tars_hold_too_little(far, tmp_path, failure, capsys):
    root = write_tars(tmp_path)
    argv = ["--mode", "eval", "--dataset", "wds/x", "--data-path", root, "--far-weight", far / "best.pth"]
    assert main.main([*map(str, argv), "--num-workers", "0"]) == 0
    assert "on 20 images" in capsys.readouterr().out
    path = root / "digits-validation-0001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    for workers in "02":
        assert f"--data-path {root}: split validation: " in failure(*argv, "--num-workers", workers)
