"""From a split to batches: order, views, shares and transforms, against values worked out here."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.loading import Augmented, Data, naming_dead_workers
from datasets.registry import build_split
from tests.conftest import digits, image_folder
from utils.configs import DataConfig
from utils.distributed import Context
from utils.errors import FarError

PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, as published


def batches(data, epoch=0, size=64, start=0):
    return [(x.clone(), y) for x, y in data.seek(data.train_loader(size), epoch, start)]


def test_evaluation_shares_hold_every_image_once():
    labels = torch.cat([y for r in range(7) for _, y in digits(world=7, rank=r).val_loader(50)])
    assert labels.bincount().tolist() == np.bincount(build_split("DIGITS", None, False).targets).tolist()


def test_subset_and_holdout_take_their_shares():
    data = digits(train_subset=0.5, holdout=0.2)
    assert (len(data.train), len(data.val)) == (575, 287)
    held = set(data.val.data.indices)
    assert not held & {data.train.data.dataset.indices[i] for i in data.train.data.indices}


def test_an_undecodable_image_is_named_through_a_worker_too(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train/class1/3.jpg").write_bytes(b"no image")
    data = Data(DataConfig("FOLDER", tmp_path, 32, num_workers=1), Context())
    with pytest.raises(FarError, match=r"class1/3\.jpg: not a readable image [^\n]*$"):
        batches(data, size=2)


def views(world, epoch=0, size=12, **kwargs):
    """Every view, as bytes, by global batch of `size`; random erasing's noise makes each draw unlike any other."""
    flags = {**PLAIN, "reprob": 1.0, **kwargs}
    parts = [batches(digits(world=world, rank=r, **flags), epoch, size // world) for r in range(world)]
    return [[x.numpy().tobytes() for images, _ in group for x in images] for group in zip(*parts, strict=True)]


@pytest.mark.parametrize("repeated", [True, False])
def test_no_two_views_of_an_epoch_are_the_same_and_world_size_does_not_change_them(repeated):
    alone = views(1, train_subset=0.1, repeated_aug=repeated)  # 144 images: each world's batches hold the same places
    assert len(set(sum(alone, []))) == sum(map(len, alone)) == 144
    for world in (2, 3):
        for mine, theirs in zip(alone, views(world, train_subset=0.1, repeated_aug=repeated), strict=True):
            assert sorted(mine) == sorted(theirs)
    padded = sum(views(4, train_subset=0.0995, repeated_aug=repeated), [])  # of 143 images: one pads the last places
    assert len(set(padded)) == len(padded) >= 132


def test_a_view_follows_from_seed_epoch_place_and_copy():
    def view(seed, epoch, index, copy):
        draw = Augmented([(None, 0)] * 2, lambda _: (torch.rand(()).item(), np.random.rand(), random.random()), seed)
        return draw[index, copy, epoch][0]

    at = view(3, 1, 0, 0)
    assert view(3, 1, 0, 0) == at
    for other in ((4, 1, 0, 0), (3, 2, 0, 0), (3, 1, 1, 0), (3, 1, 0, 1)):
        assert not set(view(*other)) & set(at), other


@pytest.mark.parametrize("repeated", [True, False])
def test_order_changes_by_epoch_and_seed_and_starts_where_it_is_told(repeated):
    def order(seed, epoch, start=0):
        data = digits(seed=seed, repeated_aug=repeated)
        loader = data.seek(data.train_loader(7), epoch, start)
        return [index for batch in loader.batch_sampler for index, *_ in batch]

    first = order(0, 0)
    assert first == order(0, 0) and first[3 * 7 :] == order(0, 0, start=3)
    assert first != order(0, 1) and first != order(1, 0) and first != sorted(first)
    if not repeated:
        assert len(set(first)) == len(first) == 1437 // 7 * 7


def test_loader_processes_live_on_from_epoch_to_epoch_and_see_each_as_it_is(monkeypatch):
    monkeypatch.setattr("datasets.loading.cores", lambda: 2)
    alone, many = (digits(train_subset=0.05, num_workers=n) for n in (0, 5))
    loader = many.train_loader(8)
    assert loader.num_workers == 2  # no more than there are cores
    pids = set()
    for epoch in (0, 1, 2):
        for (x, _), (y, _) in zip(batches(alone, epoch, 8), many.seek(loader, epoch), strict=True):
            assert torch.equal(x, y)
        pids.add(tuple(worker.pid for worker in loader._iterator._workers))
    assert len(pids) == 1


def picture(root, split, colour=None, size=(90, 60)):
    """One PNG of noise, or of one colour, in class folder `only`; returns its pixels."""
    folder = root / split / "only"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng().integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(folder / "0.png")
    return pixels


def load(root, size, train, epochs=1, **kwargs):
    """The one picture's views (epochs, 3, H, W) as the real loader gives them, in float64."""
    data = Data(DataConfig("FOLDER", root, size, num_workers=0, **kwargs), Context())
    shown = [next(iter(data.seek(data.train_loader(1), e) if train else data.val_loader(1)))[0] for e in range(epochs)]
    return torch.cat(shown).double().numpy()


def normalised(pixels, mean=MEAN, std=STD):
    return ((pixels / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("ratio", [0.875, 0.5])
def test_evaluation_resizes_crops_the_centre_and_normalises(ratio, tmp_path):
    picture(tmp_path, "train"), picture(tmp_path, "val")
    short = int(48 / ratio)
    image = Image.open(tmp_path / "val/only/0.png").resize((short * 90 // 60, short), Image.Resampling.BICUBIC)
    left, top = (round((side - 48) / 2) for side in image.size)
    expected = normalised(np.asarray(image)[top : top + 48, left : left + 48])
    assert np.abs(load(tmp_path, 48, train=False, eval_crop_ratio=ratio)[0] - expected).max() < 1e-5


def test_small_evaluation_images_are_resized_whole(tmp_path):
    picture(tmp_path, "train"), picture(tmp_path, "val")
    whole = Image.open(tmp_path / "val/only/0.png").resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(load(tmp_path, 32, train=False)[0] - normalised(np.asarray(whole))).max() < 1e-5


@pytest.mark.parametrize("train", [True, False])
def test_one_colour_comes_out_as_that_colour_normalised(train, tmp_path):
    colour = np.array([200, 90, 30])
    picture(tmp_path, "train", colour), picture(tmp_path, "val", colour)
    found = load(tmp_path, 48, train, **PLAIN)
    assert np.abs(found - ((colour / 255 - MEAN) / STD)[:, None, None]).max() < 1e-5


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_small_training_views_are_padded_crops_mirrored_half_the_time(mode, tmp_path):
    picture(tmp_path, "train"), picture(tmp_path, "val")
    whole = Image.open(tmp_path / "train/only/0.png").resize((32, 32), Image.Resampling[mode.upper()])
    padded = np.broadcast_to((-MEAN / STD)[:, None, None], (3, 40, 40)).copy()  # by 4 pixels of black
    padded[:, 4:36, 4:36] = normalised(np.asarray(whole))
    crops = np.stack([padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)])
    found = load(tmp_path, 32, True, 24, train_interpolation=mode, **PLAIN)
    straight, mirrored = (
        [np.abs(crops - view).max((1, 2, 3)).min() < 1e-5 for view in views] for views in (found, found[..., ::-1])
    )
    assert all(a != b for a, b in zip(straight, mirrored, strict=True)) and 2 < sum(mirrored) < 22
    assert len({view.tobytes() for view in found}) > 8


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "/dev/shm"),
        ("DataLoader worker (pid 3) is killed by signal: Killed.", "want of memory"),
        ("something else", None),
    ],
)
def test_a_loader_worker_without_room_says_what_to_give_it(said, cause):
    says = f"--num-workers 1: .*{cause}.*fewer workers" if cause else said
    with pytest.raises(FarError if cause else RuntimeError, match=says), naming_dead_workers(1):
        raise RuntimeError(said)
