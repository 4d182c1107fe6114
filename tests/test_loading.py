"""From a split to batches: order, views, shares and transforms, against values worked out here."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.loading import Data, naming_dead_workers
from datasets.registry import build_split
from tests.conftest import image_folder, write_images
from utils.configs import DataConfig
from utils.distributed import Context
from utils.errors import FarError

PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's, as published


def digits(seed=0, **kwargs):
    context = Context(kwargs.pop("rank", 0), kwargs.pop("world", 1))
    return Data(DataConfig("DIGITS", None, 32, **{"num_workers": 0, "seed": seed, **kwargs}), context)


def batches(data, epoch=0, size=64, start=0):
    return [(x.clone(), y) for x, y in data.at(data.train_loader(size), epoch, start)]


def test_augmentation_follows_seed_epoch_and_sample_not_workers_or_history():
    first, again = batches(digits(train_subset=0.1)), batches(digits(train_subset=0.1, num_workers=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    data = digits(train_subset=0.1)
    batches(data, epoch=0)
    late = batches(data, epoch=1)
    assert torch.equal(batches(digits(train_subset=0.1), epoch=1, start=1)[0][0], late[1][0])
    assert not torch.equal(first[0][0], late[0][0])
    assert not torch.equal(first[0][0], batches(digits(seed=1, train_subset=0.1))[0][0])


@pytest.mark.parametrize("world", [1, 7])
def test_evaluation_shares_hold_every_image_once(world):
    labels = torch.cat([y for r in range(world) for _, y in digits(world=world, rank=r).val_loader(50)])
    assert labels.bincount().tolist() == np.bincount(build_split("DIGITS", None, False).targets).tolist()


def test_subset_and_holdout_take_their_shares():
    data = digits(train_subset=0.5, holdout=0.2)
    assert (len(data.train), len(data.val)) == (575, 287)
    held = set(data.val.data.indices)
    assert not held & {data.train.data.dataset.indices[i] for i in data.train.data.indices}


def test_undecodable_image_is_named_through_a_worker_too(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train/class1/3.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        data = Data(DataConfig("FOLDER", tmp_path, 32, num_workers=workers), Context())
        with pytest.raises(FarError, match=r"class1/3\.jpg: not a readable image") as error:
            batches(data, size=2)
        assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("repeated", [True, False])
def test_what_pads_the_last_places_is_a_new_view(repeated):
    every = sum(views(4, train_subset=0.0995, repeated_aug=repeated), [])  # of 143 images
    assert len(set(every)) == len(every) >= 143 // 12 * 12


def test_one_sample_looks_different_by_seed_epoch_place_and_copy(tmp_path):
    write_images(tmp_path / "train/class0", 1)
    for i in (1, 2):
        os.link(tmp_path / "train/class0/0.jpg", tmp_path / f"train/class0/{i}.jpg")

    def view(seed, epoch, index, copy):
        data = Data(DataConfig("FOLDER", tmp_path, 48, holdout=0.1, num_workers=0, seed=seed), Context())
        return data.train[index, copy, epoch][0]

    at = (3, 1, 0, 0)
    assert torch.equal(view(*at), view(*at))
    for other in ((4, 1, 0, 0), (3, 2, 0, 0), (3, 1, 1, 0), (3, 1, 0, 1)):
        assert not torch.equal(view(*at), view(*other)), other


@pytest.mark.parametrize("repeated", [True, False])
def test_order_changes_by_epoch_and_seed_and_starts_where_it_is_told(repeated):
    def order(seed, epoch, start=0):
        data = digits(seed=seed, repeated_aug=repeated)
        loader = data.at(data.train_loader(7), epoch, start)
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
        for (x, _), (y, _) in zip(batches(alone, epoch, 8), many.at(loader, epoch), strict=True):
            assert torch.equal(x, y)
        pids.add(tuple(worker.pid for worker in loader._iterator._workers))
    assert len(pids) == 1


@pytest.mark.parametrize("repeated", [True, False])
def test_smallest_batch_is_the_size_of_every_training_batch(repeated):
    for size in (7, 500):
        for rank in (0, 2):
            data = digits(train_subset=0.05, repeated_aug=repeated, world=3, rank=rank)
            sizes = {len(batch) for batch in data.at(data.train_loader(size), 0).batch_sampler}
            assert sizes == {data.smallest_batch(size)}


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
    shown = [next(iter(data.at(data.train_loader(1), e) if train else data.val_loader(1)))[0] for e in range(epochs)]
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
    if train:  # the flags that change colours arrive
        assert np.ptp(load(tmp_path, 48, train, 4, **{**PLAIN, "color_jitter": 0.4}), axis=0).max() > 0.05
        assert np.ptp(load(tmp_path, 48, train, 8, **{**PLAIN, "aa": "rand-m9-mstd0.5-inc1"}), axis=0).max() > 0.05


def shifts(image, fill):
    """All (81, 3, 32, 32) crops of an image padded by 4 pixels of `fill`, a normalised black."""
    padded = np.broadcast_to(fill[:, None, None], (3, 40, 40)).copy()
    padded[:, 4:36, 4:36] = image
    return np.stack([padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)])


def nearest(view, candidates):
    return np.abs(candidates - view).max((1, 2, 3)).min()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_small_training_views_are_padded_crops_mirrored_half_the_time(mode, tmp_path):
    picture(tmp_path, "train"), picture(tmp_path, "val")
    whole = Image.open(tmp_path / "train/only/0.png").resize((32, 32), Image.Resampling[mode.upper()])
    candidates = shifts(normalised(np.asarray(whole)), -MEAN / STD)
    found = load(tmp_path, 32, True, 24, train_interpolation=mode, **PLAIN)
    straight = [nearest(view, candidates) < 1e-5 for view in found]
    mirrored = [nearest(view[:, :, ::-1], candidates) < 1e-5 for view in found]
    assert all(a != b for a, b in zip(straight, mirrored, strict=True)) and 2 < sum(mirrored) < 22
    assert len({view.tobytes() for view in found}) > 8


def test_training_digits_are_never_mirrored():
    data = digits(**PLAIN)
    half = np.full(3, 0.5)
    for index in range(0, 1437, 160):
        image = data.train.data[index][0].resize((32, 32), Image.Resampling.BICUBIC)
        candidates = shifts(normalised(np.asarray(image), half, half), np.full(3, -1.0))
        assert nearest(data.train[index, 0][0].double().numpy(), candidates) < 1e-5


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_random_erasing_flags_reach_the_transform(mode, tmp_path):
    colour = np.array([200, 90, 30])
    picture(tmp_path, "train", colour), picture(tmp_path, "val", colour)
    whole = ((colour / 255 - MEAN) / STD)[:, None, None]

    def erased(prob, count):  # ((H, W) erased or not, the erased values (pixels, 3)) by epoch
        found = load(tmp_path, 48, True, 20, **{**PLAIN, "reprob": prob, "remode": mode, "recount": count})
        masks = np.abs(found - whole).max(1) > 1e-5
        return [(mask, view.transpose(1, 2, 0)[mask]) for view, mask in zip(found, masks, strict=True)]

    def boxed(mask):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()

    assert 1 < sum(mask.any() for mask, _ in erased(0.5, 1)) < 19
    for mask, values in erased(1.0, 1):
        assert boxed(mask) and (not values.any() if mode == "const" else np.ptp(values, axis=0).max() > 0.5)
    assert not all(boxed(mask) for mask, _ in erased(1.0, 4))


def test_too_few_images_are_refused(tmp_path):
    root = image_folder(tmp_path, classes=1, count=2)
    with pytest.raises(FarError, match="--holdout 0.9, --data-path .*: no training images are left"):
        Data(DataConfig("FOLDER", root, 32, holdout=0.9), Context())
    with pytest.raises(FarError, match="--nproc_per_node: 2 processes but 1 training images; start fewer"):
        digits(train_subset=0.001, world=2)


@pytest.mark.parametrize("text", ["auto", "rand-n20-tweights", "v1"])
def test_policies_that_timm_cannot_run_are_one_line(text):
    with pytest.raises(FarError, match="^--aa .* or use none$"):
        digits(aa=text)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "/dev/shm"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid 3) is killed by signal: Killed.", "want of memory"),
        ("something else", None),
    ],
)
def test_a_loader_worker_without_room_says_what_to_give_it(said, cause):
    says = f"--num-workers 1: .*{cause}.*fewer workers" if cause else said
    with pytest.raises(FarError if cause else RuntimeError, match=says), naming_dead_workers(1):
        raise RuntimeError(said)
