"""One image file to 8-bit RGB, against values worked out here; and every file that must be refused by name."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data import create_transform

from datasets.images import read_image
from utils.errors import FarError
from utils.preprocessing import Preprocessing, cut_strip


def noise(high, *shape, dtype):
    return np.random.default_rng().integers(0, high, shape, dtype=dtype)


def pixels(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tif", ">u2"), ("pgm", "<u2"), ("tif", "<i4")])
def test_sixteen_bit_greys_span_black_to_white(suffix, dtype, tmp_path):
    grey = noise(65536, 9, 7, dtype=np.uint16)
    grey[0, :4] = 0, 65535, 257, 65535 - 257
    Image.fromarray(grey.astype(dtype)).save(tmp_path / f"a.{suffix}")
    found = pixels(tmp_path / f"a.{suffix}")
    assert found[0, :4, 0].tolist() == [0, 255, 1, 254]
    assert np.abs(found - grey[..., None] / 257).max() <= 0.5


def test_float_greys_span_zero_to_one(tmp_path):
    grey = np.random.default_rng().random((9, 7), dtype=np.float32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.abs(pixels(tmp_path / "a.tif") - grey[..., None].astype(float) * 255).max() <= 0.5


def test_eight_bit_files_give_their_own_colours(tmp_path):
    colour, alpha = noise(256, 9, 7, 3, dtype=np.uint8), noise(256, 9, 7, 1, dtype=np.uint8)
    grey, bit, index = colour[..., :1], noise(2, 9, 7, dtype=np.uint8), noise(16, 9, 7, dtype=np.uint8)
    palette = Image.fromarray(index, "P")
    palette.putpalette((table := noise(256, 16, 3, dtype=np.uint8)).tobytes())
    cases = {
        "rgba.png": (Image.fromarray(np.concatenate([colour, alpha], 2)), colour),
        "la.png": (Image.fromarray(np.concatenate([grey, alpha], 2)), grey),
        "bit.png": (Image.fromarray(bit * 255).convert("1"), bit[..., None] * 255),
        "palette.png": (palette, table[index]),
        "cmyk.tif": (Image.fromarray(np.concatenate([255 - colour, 0 * alpha], 2), "CMYK"), colour),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name), np.broadcast_to(expected, colour.shape)), name
    palette.save(tmp_path / "veiled.png", transparency=bytes(range(16)))  # PIL would warn of it at every image
    assert np.array_equal(pixels(tmp_path / "veiled.png"), table[index])
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)  # not inverted
    assert np.abs(pixels(tmp_path / "red.jpg") - np.array([255.0, 0, 0])).max() < 8


def test_what_is_no_picture_is_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(noise(256, 64, 64, 3, dtype=np.uint8)).save(cut := tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    Image.fromarray(np.full((3, 3), 1.5, dtype=np.float32)).save(tmp_path / "bright.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    for name, reason in {
        "cut.jpg": "truncated",
        "text.jpg": "of no known format",
        "bomb.png": "more than 6,000 pixels",
        "bright.tif": "greys of .* outside 0 to",
        "missing.jpg": "no such file",
    }.items():
        with pytest.raises(FarError, match=rf"^{tmp_path}/{name}: .*{reason}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_pictures_are_upright_as_viewers_show_them(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(256, 6, 9, 3, dtype=np.uint8)).save(path, exif=exif)
    assert np.array_equal(pixels(path), ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert pixels(path).shape[0] == (9 if orientation > 4 else 6)


def test_a_strip_is_evaluated_as_its_middle():
    slope = np.linspace(0, 255, 40 * 400).astype(np.uint8).reshape(40, 400)
    image = Image.fromarray(slope.T).convert("RGB")
    whole = create_transform(32, is_training=False, crop_pct=0.9, interpolation="bicubic")(image)
    assert (Preprocessing(crop_pct=0.9).transform(32)(image) - whole).abs().max() < 0.1
    assert cut_strip(Image.new("RGB", (1_000_000, 1))).size == (8, 1)  # resized whole it would take gigabytes
