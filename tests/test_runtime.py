"""runtime/: the program and the library that run a model without Python, against torch."""

import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
from datasets.images import read_image
from datasets.registry import Digits, photographs
from deploy.engine_file import LINE, PROGRAM, ROOT, checksum, to_bytes, why_no_program
from deploy.packed import Natural, natural_form
from models.replace import FarConfig, build, load_model
from tests.test_engine import MODELS, images_for
from tests.test_int8 import far_run_on_aarch64
from utils.preprocessing import Preprocessing

NAMES = [f"class {chr(0x1F600)} \u00e9 {i}" for i in range(10)]
PREPARED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9, "crop_mode": "center"}
RECORDS, EACH = 26, 30  # where the blocks' records begin in a plan, and the numbers of each
FACTS = {"data": {**PREPARED, "interpolation": "bicubic"}, "classes": NAMES}


@pytest.fixture(autouse=True, scope="module")
def built():
    if reason := why_no_program():
        pytest.skip(f"far-run cannot be built: {reason}")


def far_run(*words, code: int = 0, program=(PROGRAM,)) -> bytes:
    """What it prints, or with an exit code of 2 what it says."""
    done = subprocess.run([*program, *map(str, words)], capture_output=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr.decode()
    return done.stderr if code else done.stdout


def write(path: Path, model, precision=torch.float32, facts=FACTS) -> Path:
    path.write_bytes(to_bytes(natural_form(model, precision), facts))
    return path


def logits_of(model: Path, *files, program=(PROGRAM,)) -> torch.Tensor:
    raw = far_run(model, "--raw", *files, program=program)
    return torch.from_numpy(np.frombuffer(raw, "<f4").copy())


def micro(seed: int = 0, size: int = 32, rep_by: str = "multi-lstm"):
    torch.manual_seed(seed)
    model = build(FarConfig("DeiT-Micro", 10, size, rep_by, (1, 2))).eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("runtime") / "model.far", micro())


@pytest.fixture(scope="module")
def int8_file(tmp_path_factory) -> Path:
    """Each kind of number that there is: some products stay float32."""
    natural = natural_form(micro(), torch.int8, ("w_hh", "fc1", "head"))
    file = tmp_path_factory.mktemp("runtime") / "int8.far"
    file.write_bytes(to_bytes(natural, FACTS))
    return file


@pytest.mark.parametrize("name", ["tiny", "ragged", "odd width", "oblong", "registers", "odd width of mingru"])
@pytest.mark.parametrize(("precision", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.int8, 3e-2)])
def test_a_file_in_the_program_is_the_model(name, precision, most, tmp_path):
    model = MODELS[name]()
    images = images_for(model, 3)
    (tmp_path / "images.f32").write_bytes(images.numpy().tobytes())
    file = write(tmp_path / "model.far", model, precision, {"data": {}, "classes": None})
    got = logits_of(file, "--threads", 2, tmp_path / "images.f32").view(3, -1)
    with torch.no_grad():
        expected = model(images)
    assert (got - expected).abs().max() < most * expected.abs().max()


def test_the_library_answers_many_threads_and_names_the_classes(model_file):
    class Shape(ctypes.Structure):
        numbers = [(name, ctypes.c_int64) for name in ("channels", "height", "width", "classes")]
        _fields_ = [*numbers, ("names", ctypes.POINTER(ctypes.c_char_p)), ("config", ctypes.c_char_p)]

    library = ctypes.CDLL(str(PROGRAM.with_name("libfar.so")))
    library.far_open.restype, library.far_describe.restype = ctypes.c_void_p, Shape
    library.far_error.restype = library.far_run.restype = ctypes.c_char_p
    model = ctypes.c_void_p(library.far_open(str(model_file).encode()))
    assert library.far_error(model) is None
    shape = library.far_describe(model)
    assert (shape.channels, shape.height, shape.width, shape.classes) == (3, 32, 32, 10)
    assert [shape.names[i].decode() for i in range(10)] == NAMES
    assert json.loads(shape.config) == json.loads(json.dumps(FACTS))

    def run(images: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(len(images), 10)
        pointers = (ctypes.c_void_p(images.data_ptr()), ctypes.c_int64(len(images)), ctypes.c_void_p(logits.data_ptr()))
        assert library.far_run(model, *pointers, 2) is None
        return logits

    batches = [torch.randn(batch, 3, 32, 32) for batch in (1, 3, 8, 2)]
    expected = [micro()(images) for images in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(20):
            for got, logits in zip(pool.map(run, batches), expected, strict=True):
                torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    assert b"no threads" in library.far_run(model, None, ctypes.c_int64(1), None, 0)
    library.far_close(model)
    missing = ctypes.c_void_p(library.far_open(b"not there"))
    assert b"is no file that can be opened" in library.far_error(missing) and library.far_describe(missing).classes == 0
    library.far_close(missing)


@pytest.mark.parametrize(
    ("crop_mode", "interpolation", "crop_pct"),
    [("center", "bicubic", 0.8), ("center", "bilinear", 0.9), ("squash", "bicubic", 1.0), ("squash", "bilinear", 0.7)],
)
def test_the_program_names_what_is_in_pictures_as_python_does(crop_mode, interpolation, crop_pct, tmp_path):
    """Digits, photographs of many sizes, every kind of colour, every turn of a camera."""
    prepared = {**PREPARED, "crop_mode": crop_mode, "interpolation": interpolation, "crop_pct": crop_pct}
    model, how = micro(1, 64), Preprocessing(**prepared)
    file = write(tmp_path / "model.far", model, facts={"data": prepared, "classes": None})
    temple, flower = photographs().values()
    pictures = {f"digit{i:02}.png": image for i, image in enumerate(Digits(False).images[:40])}
    pictures |= {f"photo{i}.png": temple.crop((40 * i, 10 * i, 300 + 20 * i, 150 + 30 * i)) for i in range(8)}
    pictures |= {
        "grey.png": flower.convert("L"),
        "palette.png": flower.convert("P"),
        "alpha.png": flower.convert("RGBA"),
    }
    pictures |= {"flower.bmp": flower, "one.png": flower.crop((9, 9, 10, 10)), "strip.png": temple.resize((640, 20))}
    for name, image in pictures.items():
        image.save(tmp_path / name)
    for turned in range(1, 9):
        (exif := Image.Exif())[0x112] = turned
        temple.resize((90, 70)).save(tmp_path / (name := f"turned{turned}.jpg"), exif=exif, quality=95)
        pictures[name] = None
    files = [tmp_path / name for name in pictures]
    expected = model(torch.stack([how.transform(64)(read_image(path)) for path in files]))
    got = logits_of(file, *files).view(len(files), -1)
    assert torch.equal(got.argmax(1), expected.argmax(1))
    jpegs = torch.tensor([path.suffix == ".jpg" for path in files])  # whose decoders round otherwise
    gap = (got - expected).abs().amax(1) / expected.abs().max()
    assert gap[~jpegs].max() < 1e-5 and gap[jpegs].max() < 1e-3
    said = far_run(file, "--top", 2, files[0]).decode().splitlines()
    order = expected[0].softmax(0).topk(2)
    shown = [
        f"  {100 * p:6.2f} %  class {i}" for p, i in zip(order.values.tolist(), order.indices.tolist(), strict=True)
    ]
    assert said[0].startswith(f"{files[0]}  (") and said[1:] == shown


def test_a_broken_picture_is_named_and_the_others_are_answered(model_file, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    (tmp_path / "odd.f32").write_bytes(b"123")
    os.mkfifo(tmp_path / "pipe.png")
    words = [tmp_path / name for name in "pipe.png broken.png red.png odd.f32 . none.png".split()]
    done = subprocess.run([PROGRAM, model_file, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout.count("(") == 1 and NAMES[0][:6] in done.stdout
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [str(w) for w in words if w.name != "red.png"]


def test_memory_that_does_not_suffice_is_a_text(model_file):
    limited = ("sh", "-c", 'ulimit -v 40000 && exec "$0" "$@"', PROGRAM)
    assert far_run(model_file, "--bench", "--batch", 4096, code=2, program=limited) == b"error: out of memory\n"


def damaged(content: bytes, at: int, form: str, *values) -> bytes:
    return content[:at] + struct.pack(form, *values) + content[at + struct.calcsize(form) :]


def with_plan(content: bytes, place: int, value: int) -> bytes:
    """A number of the plan changed, and the checksum made right."""
    config = struct.unpack_from("<q", content, 16)[0]
    changed = damaged(content, LINE + config + -config % LINE + 8 * place, "<q", value)
    return damaged(changed, 48, "<2Q", *checksum(changed[LINE:]))


DAMAGES = {
    "another kind": (lambda c: b"\x89PNG" + c[4:], "is no file of"),
    "cut short": (lambda c: c[:-1], "is cut short"),
    "longer": (lambda c: c + b"1", "is longer than its parts"),
    "a bit": (lambda c: c[:-999] + bytes([c[-999] ^ 1]) + c[-998:], "its checksum is another"),
    "foreign": (lambda c: damaged(c, 8, ">q", 4), "the other order of bytes"),
    "future": (lambda c: damaged(c, 8, "<q", 99), "version 99"),
    "no size": (lambda c: damaged(c, 32, "<q", -1), "have no sizes"),
    "no precision": (lambda c: with_plan(c, 2, 3), "have no precision"),
    "2^62 classes": (lambda c: with_plan(c, 12, 2**62), "its plan does not fit"),
    "a table of cells over the blocks": (lambda c: with_plan(c, RECORDS + EACH + 6, RECORDS), "its plan does not fit"),
    "packed": (lambda c: with_plan(c, 1, 8), "packed for another kind of CPU"),
    "huge part": (lambda c: damaged(c, 32, "<q", 2**39), "is cut short"),
    "another precision": (lambda c: with_plan(c, 2, 2), "its plan does not fit"),
    "weights kept in float32": (lambda c: with_plan(c, 20, 1), "its plan does not fit"),
    "2^40 blocks": (lambda c: with_plan(c, 11, 2**40), "its plan does not fit"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_words(name, model_file, tmp_path):
    damage, said = DAMAGES[name]
    (tmp_path / "bad.far").write_bytes(damage(model_file.read_bytes()))
    assert said in far_run(tmp_path / "bad.far", "--bench", code=2).decode()


def test_records_that_share_their_weights_are_refused(tmp_path):
    """A small file, each of whose maps begins at the first weight, would be packed into a large model."""
    plan, vectors, products = natural_form(micro(), torch.float32)
    numbers, most = plan.tolist(), 0
    blocks = range(RECORDS, RECORDS + EACH * numbers[11], EACH)
    for place in (16, 21, *(block + at for block in blocks for at in (10, 15, 20, 25))):
        most = max(most, numbers[place] * numbers[place + 1])
        numbers[place + 2] = 0
    for block in blocks:
        for cell in range(numbers[block + 6], numbers[block + 6] + 8 * numbers[block + 7], 8):
            numbers[cell + 4] = numbers[cell + 5] = 0
    small = Natural(torch.tensor(numbers), vectors, products[:most])
    (tmp_path / "small.far").write_bytes(to_bytes(small, FACTS))
    assert "its plan does not fit" in far_run(tmp_path / "small.far", "--bench", code=2).decode()


def test_flipped_bits_are_refused_or_answered_under_the_sanitizers(model_file, int8_file, tmp_path):
    sources = [ROOT / "runtime/fuzz.cpp", ROOT / "models/kernels/cpp/model.cpp"]
    flags = ["-std=c++20", "-O1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-fno-sanitize=null,alignment,object-size"]  # half of the time to compile; the address check sees most
    built = subprocess.run(
        ["c++", *flags, *sources, "-o", tmp_path / "fuzz"], capture_output=True, text=True, check=False
    )
    if built.returncode and "san" in built.stderr:
        pytest.skip("no sanitizers here")
    assert built.returncode == 0, built.stderr
    for file in (model_file, int8_file):
        said = far_run(file, 500, 0, program=(tmp_path / "fuzz",)).decode()
        answered = int(said.split(", ")[1].split()[0])
        assert said.startswith("500 files") and 25 < answered < 350


def test_another_machine_computes_the_same(model_file, int8_file, tmp_path):
    there = far_run_on_aarch64()
    for i, image in enumerate(Digits(False).images[:2]):
        image.save(tmp_path / f"{i}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for file, most in ((model_file, 1e-4), (int8_file, 1e-2)):  # a last bit may round a number the other way
        torch.testing.assert_close(logits_of(file, *files, program=there), logits_of(file, *files), rtol=0, atol=most)


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="no ziglang")
def test_zig_compiles_the_sources_for_another_machine(tmp_path):
    """They are not linked: zig would first compile its C++ library, for minutes."""
    words = ["TARGET=aarch64-linux-musl", f"ZIG={sys.executable} -m ziglang"]
    made = subprocess.run(["make", "-nB", "-C", ROOT, "runtime", *words], capture_output=True, text=True, check=True)
    calls = [line for line in made.stdout.splitlines() if " -c " in line]
    assert len(calls) == 3 and all("ziglang c++ -target aarch64-linux-musl -static -std=c++20 -O3" in s for s in calls)
    for call in calls:
        command = f"{call.replace(' -O3 ', ' -O0 ').partition(' -o ')[0]} -o {tmp_path}/part.o"
        assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == 0


def test_export_writes_a_file_that_the_program_agrees_with(far, tmp_path, capsys):
    output = tmp_path / "deep" / "model.far"
    words = ["--to", "engine", "--far-weight", str(far / "best.pth"), "--output", str(output)]
    assert export.main([*words, "--dataset", "DIGITS"]) == 0
    assert "far-run, started each time" in (said := capsys.readouterr().out) and "float32" in said
    model, config = load_model(far / "best.pth")
    content = output.read_bytes()
    assert (
        json.loads(content[LINE : LINE + struct.unpack_from("<q", content, 16)[0]])["config"]["base_model"]
        == config.base_model
    )
    for precision, share in (("bfloat16", 0.6), ("int8", 0.4)):
        assert export.main([*words, "--precision", precision]) == 0
        assert len(output.read_bytes()) < share * len(content)
