"""Data sets read from front to back: each sample once, an order that resumes, errors of one line."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets.images import read_image
from datasets.registry import Digits
from datasets.streams import open_data
from engine.train import Trainer
from tests.conftest import assert_equal, report, rows, weights
from utils.configs import DataConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.script import run_script

PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}
TRAIN, VALIDATION = (14, 14, 12), (11, 9)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, name: str, lengths: tuple[int, ...], numbers: Iterator[int]) -> dict:
    """Tars of the digits of these numbers, as WebDataset has them; returns their part of _info.json."""
    digits, files = Digits(True), [f"digits-{name}-{k:04}.tar" for k in range(len(lengths))]
    for file, length in zip(files, lengths, strict=True):
        with tarfile.open(root / file, "w") as tar:
            for k in range(length):
                image, label = digits[next(numbers)]
                image.save(content := io.BytesIO(), "png")
                add(tar, f"{file[:-4]}-{k}.png", content.getvalue())
                add(tar, f"{file[:-4]}-{k}.cls", str(label).encode())
    return {"name": name, "filenames": files, "shard_lengths": list(lengths), "num_samples": sum(lengths)}


def write_tars(root: Path, train=TRAIN, validation=VALIDATION, numbers=None, **info) -> Path:
    """Digits 0 to 39 to train on, or those of `numbers`, and 100 to 119 to evaluate."""
    root.mkdir(parents=True, exist_ok=True)
    splits = {
        "train": write_shards(root, "train", train, numbers or count()),
        "validation": write_shards(root, "validation", validation, count(100)),
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
    return [(x.clone(), y.clone()) for x, y in data.seek(data.train_loader(size), epoch, start)]


def order(data, epoch=0, size=4, start=0):
    """The numbers of an epoch's samples, where nothing is augmented."""
    data.train.transform = data.val.transform
    return numbers(torch.cat([x for x, _ in batches(data, epoch, size, start)]), data.val.transform)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (3, 0)])
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


@pytest.mark.parametrize("workers", [0, 2])
def test_training_order_follows_seed_and_epoch_and_starts_anywhere(tars, workers):
    data = stream(tars, num_workers=workers)
    first, other = order(data), order(data, epoch=1)
    assert order(data) == first == order(stream(tars, num_workers=workers))  # whatever was read before
    assert len({tuple(o) for o in (first, other, order(stream(tars, num_workers=workers, seed=1)), sorted(first))}) == 4
    for start in (1, 4, 9):
        assert order(data, start=start) == first[4 * start :]
    assert batches(data, start=10) == []  # an epoch that is done but for its evaluation


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (3, 0)])
def test_processes_take_equally_many_full_batches_of_their_own(tars, world, workers):
    parts = [stream(tars, rank, world, num_workers=workers) for rank in range(world)]
    (length,) = {len(data.train_loader(3)) for data in parts}
    for data in parts:
        assert [len(x) for x, _ in batches(data, 0, 3)] == [3] * length
    read = [set(order(data, 0, 3)) for data in parts]
    assert len(set().union(*read)) == sum(map(len, read))


def test_no_two_views_of_a_picture_are_the_same_and_each_follows_from_its_place(tmp_path):
    root = write_tars(tmp_path, train=(4, 4), numbers=repeat(7))  # eight times the same digit

    def views(epoch, rank, world, seed=0, start=0):
        data = stream(root, rank, world, seed=seed, reprob=1.0)
        return [x.numpy().tobytes() for images, _ in batches(data, epoch, 2, start) for x in images]

    every = [*views(0, 0, 1), *views(1, 0, 1), *views(0, 1, 2), *views(0, 0, 1, seed=1)]
    assert len(set(every)) == len(every) == 8 + 8 + 4 + 8
    assert views(1, 0, 1, start=1) == every[10:16]


def test_a_picture_is_read_as_the_same_file_in_a_folder(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    root = write_tars(tmp_path / "tars", validation=(1,))
    with tarfile.open(root / "digits-validation-0000.tar", "w") as tar:
        add(tar, "a.png", (tmp_path / "a.png").read_bytes())
        add(tar, "a.cls", b"3")
    data = stream(root)
    ((images, labels),) = list(data.val_loader(2))
    assert torch.equal(images[0], data.val.transform(read_image(tmp_path / "a.png"))) and labels.tolist() == [3]


TEACH = "--mode teacher --scale Micro --dataset wds/x --batch-size 8 --num-workers 1 --epochs 1 --mixup 0.8".split()


def test_a_training_that_stops_within_an_epoch_resumes_bit_equal(tars, tmp_path, monkeypatch, failure):
    monkeypatch.chdir(tmp_path)
    argv = [*TEACH, "--data-path", str(tars), "--output-dir"]
    assert main.main([*argv, "whole"]) == 0
    assert report(Path("whole"))["images"] == 20
    read, calls = Trainer.read_losses, []

    def stop_at_the_third(self, losses, stage, curve_every):
        calls.append(len(losses))
        value = read(self, losses, stage, curve_every)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "read_losses", stop_at_the_third)
        assert run_script(main.main, [*argv, "run"]) == 0
    assert calls[:3] == [1, 1, 1] and not Path("run/result.json").exists()
    assert "--num-workers 1, not 0" in failure(*argv, "run", "--resume", "--num-workers", "0")
    assert main.main([*argv, "run", "--resume"]) == 0
    for file in ("best.pth", "last.pth"):
        assert_equal(weights(Path("run"), file), weights(Path("whole"), file))
    log, expected = ([(row["train"], row["val"]) for row in rows(Path(run))] for run in ("run", "whole"))
    assert log == expected


def test_a_dry_run_knows_streams(tars, capsys):
    assert main.main([*TEACH, "--data-path", str(tars), "--dry-run"]) == 0
    assert f"wds/x in {tars}: 40 training, 20 evaluation images, 10 classes" in capsys.readouterr().out


def test_the_number_of_classes_is_told_or_named(tmp_path):
    root = write_tars(tmp_path, num_classes=None)
    with pytest.raises(FarError, match="--dataset wds/digits: does not tell its number of classes; name --nb-classes"):
        stream(root)
    assert stream(root, nb_classes=12).num_classes == 12


def test_an_evaluation_that_is_not_of_every_picture_is_one_line(tmp_path):
    root = write_tars(tmp_path)
    path = root / "digits-validation-0001.tar"
    path.write_bytes(path.read_bytes()[: 2 * 2048 + 600])  # within the third picture
    with pytest.raises(FarError, match=f"^--data-path {root}: split validation: holds 13 readable images of 20"):
        list(stream(root).val_loader(4))


def test_more_processes_than_tars_and_a_missing_package_are_told(tars, monkeypatch):
    with pytest.raises(FarError, match="--nproc_per_node: 4 processes but 3 training tars"):
        stream(tars, 0, 4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FarError, match="--dataset wds/digits: needs the package webdataset; pip install "):
        stream(tars)
