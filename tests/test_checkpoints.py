"""A checkpoint gives back its model or one clear line, whatever its bytes say; nothing in it is executed."""

import copy
import math
import os
import re
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from datetime import datetime
from pathlib import PosixPath

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.deit import create_teacher, load_teacher_weights
from models.replace import FarConfig, build, load_model, pack, parse_blocks
from tests.conftest import EVAL, ROOT, TEACH
from utils import checkpoint
from utils.errors import FarError

FAR = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), units={"2": [[3, 32], [32, 1]]}, mlp={"1": 40})
HOSTILE = [
    None,
    True,
    0,
    -1,
    1.0,
    math.nan,
    33,
    10**6,
    10**9,
    10**300,
    "x",
    "32",
    b"",
    (),
    [],
    {},
    [[[1]]],
    {"0": 1},
    {1: 2},
    torch.ones(2),
    {"0": torch.ones(2)},
    {"0": [[32, 32], [32, True]]},
    (9,),
    (0, 0),
    ("0",),
    (True,),
]


def content(config=FAR):
    """A checkpoint's content, weights fresh random numbers."""
    return pack(build(config), config)


def write(path, value):
    checkpoint.save(path, value)
    return path


def refusal(path, load=load_model):
    """The one line that loading this file gives."""
    with pytest.raises(FarError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 400 + len(str(path)), line
    return line.removeprefix(f"{path}: ")


def same_function(path, expected):
    images = torch.randn(2, 3, 32, 32)
    model, _ = load_model(path)
    assert not model.training
    return torch.equal(model(images), restored(expected)(images))


def restored(expected):
    model = build(FarConfig(**expected["config"])).eval()
    model.load_state_dict(expected["model"])
    return model


def test_a_checkpoint_gives_back_its_model_in_real_memory_of_its_own(tmp_path):
    saved = content()
    path = write(tmp_path / "a.pth", saved)
    assert same_function(path, saved)
    model, config = load_model(path)
    assert config == FAR
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"} and all(p.requires_grad for p in model.parameters())
    assert len({t.data_ptr() for t in tensors}) == len(tensors) and all(t.is_contiguous() for t in tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"num_classes": 11}, "head.weight has shape"),
        ({"num_classes": math.nan}, "num_classes"),
        ({"img_size": 33}, "img_size"),
        ({"img_size": 0}, "img_size"),
        ({"img_size": 10**6}, "img_size"),
        ({"img_size": 32.0}, "img_size"),
        ({"img_size": "32"}, "img_size"),
        ({"img_size": 36}, "pos_embed has shape"),
        ({"base_model": "DeiT-Huge"}, "base_model"),
        ({"base_model": ["DeiT-Micro"]}, "base_model"),
        ({"base_model": None}, "base_model"),
        ({"base_model": "DeiT-Tiny", "units": {}}, "another architecture"),
        ({"rep_by": {}}, "rep_by"),
        ({"rep_by": "mixer"}, "units"),
        ({"rep_by": "mixer", "units": {"2": []}}, "units"),
        ({"replaced": (0, 2, 9)}, "replaced"),
        ({"replaced": (0, 2, 2)}, "replaced"),
        ({"replaced": (0, -2)}, "replaced"),
        ({"replaced": (0, True, 2)}, "replaced"),
        ({"replaced": "02"}, "replaced"),
        ({"replaced": (0, 1, 2)}, "another architecture"),
        ({"units": {"2": [[3, 32], [32, 33]]}}, "units"),
        ({"units": {"2": [[3, 32], [32, 0]]}}, "units"),
        ({"units": {"2": [[3, 32], [32, -1]]}}, "units"),
        ({"units": {"2": [[3, 32], [32, "1"]]}}, "units"),
        ({"units": {"2": [[3, 32], [32, True]]}}, "units"),
        ({"units": {"2": [[3, 32]]}}, "units"),
        ({"units": {"2": [[3, 32, 1], [32, 1]]}}, "units"),
        ({"units": {"2": [3, 32]}}, "units"),
        ({"units": {"2": 3}}, "units"),
        ({"units": {"1": [[3, 32], [32, 1]]}}, "units"),
        ({"units": {2: [[3, 32], [32, 1]]}}, "units"),
        ({"units": {"2": torch.ones(2, 2)}}, "units"),
        ({"units": {"2": [[3, 32], [31, 1]]}}, r"lstm\.1\.0\.weight_ih has shape"),
        ({"mlp": {"77": 5}}, "mlp"),
        ({"mlp": {"1": 0}}, "mlp"),
        ({"mlp": {"1": 10**9}}, "mlp"),
        ({"mlp": {"1": 41}}, "has shape"),
        ({"mlp": None}, "mlp"),
        ({"surprise": 1}, "not a FAR checkpoint"),
        ({"num_classes": torch.tensor(10)}, "num_classes"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_one_line(change, said, tmp_path):
    saved = content()
    saved["config"].update(change)
    assert re.search(said, refusal(write(tmp_path / "a.pth", saved)))


@pytest.mark.parametrize("name", ["base_model", "num_classes", "img_size", "replaced", "units", "mlp"])
def test_a_missing_field_is_one_line(name, tmp_path):
    saved = content()
    del saved["config"][name]
    refusal(write(tmp_path / "a.pth", saved))


def quantized(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop them; files that hold them stay
        return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


def test_one_number_claimed_to_be_a_billion_allocates_nothing(tmp_path):
    saved = content(FarConfig("DeiT-Micro", 10, 32, rep_by="mixer", replaced=(0,)))
    saved["config"]["img_size"], tokens = 1024, 256 * 256 + 1
    saved["model"]["pos_embed"] = torch.zeros(1).expand(1, tokens, 64)
    for name, shape in (("fc1", (2 * tokens, tokens)), ("fc2", (tokens, 2 * tokens))):
        saved["model"][f"blocks.0.attn.{name}.weight"] = torch.zeros(1).expand(shape)
        saved["model"][f"blocks.0.attn.{name}.bias"] = torch.zeros(1).expand(shape[:1])
    assert "parameters" in refusal(write(tmp_path / "a.pth", saved))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(40, 64, dtype=torch.int64), "int64"),
        (torch.ones(40, 64, dtype=torch.complex64), "complex64"),
        (torch.ones(40, 64).to_sparse(), "sparse"),
        (torch.ones(40, 64, device="meta"), "meta"),
        (torch.ones(64, 40), "has shape"),
        (quantized(40, 64), "qint8"),
        (torch.ones(40, 64).bool(), "bool"),
        (torch.full((40, 64), math.nan), "holds NaN"),
        (torch.full((40, 64), math.inf), "holds infinity"),
        (torch.full((40, 64), 1e200, dtype=torch.float64), "holds infinity"),
        ([1.0], "is a list"),
        (None, "NoneType"),
        ({}, "is a dict"),
    ],
)
def test_weights_that_are_no_finite_dense_floats_are_named(value, said, tmp_path):
    saved = content()
    saved["model"]["blocks.1.mlp.fc1.weight"] = value
    line = refusal(write(tmp_path / "a.pth", saved))
    assert "blocks.1.mlp.fc1.weight" in line and said in line


def test_names_that_are_no_names_and_weights_that_are_no_dictionary_are_one_line(tmp_path):
    saved = content()
    saved["model"] = {**saved["model"], 7: torch.ones(1), None: 1}
    assert "besides" in refusal(write(tmp_path / "a.pth", saved))
    saved["model"] = [torch.ones(1)]
    assert "not a FAR checkpoint" in refusal(write(tmp_path / "b.pth", saved))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 256])
def test_other_precisions_and_shared_or_repeated_memory_become_float32(dtype, rows, tmp_path):
    saved = content()
    name, other = (f"blocks.{i}.mlp.fc1.weight" for i in (0, 2))
    saved["model"][name] = saved["model"][other] = torch.randn(rows, 64, dtype=dtype).expand(256, 64)
    model, _ = load_model(write(tmp_path / "a.pth", saved))
    first, second = (model.get_parameter(n) for n in (name, other))
    assert first.dtype == torch.float32 and torch.equal(first, saved["model"][name].float())
    with torch.no_grad():
        first[0] += 1
    assert not torch.equal(first[0], first[1]) and torch.equal(second, saved["model"][other].float())


def test_hostile_checkpoints_end_a_script_in_one_line(tmp_path, failure):
    saved = content()
    saved["config"]["num_classes"] = 10**9
    path = write(tmp_path / "a.pth", saved)
    assert f"--far-weight {path}: its configuration" in failure("--mode", "eval", *EVAL, "--far-weight", path)


# ---- files


def test_a_file_is_read_as_what_it_is_not_as_what_it_is_called(tmp_path):
    state = create_teacher("DeiT-Micro", 10, 32).state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "a.safetensors", "legacy.pth"):
        loaded = checkpoint.load(tmp_path / name)
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "load", [load_model, lambda path: load_teacher_weights(create_teacher("DeiT-Micro", 10, 32), path, "")]
)
def test_a_payload_is_refused_and_not_run(new, load, tmp_path):
    saved = {**content(), "position": Payload(tmp_path / "executed")}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    assert "refuses to execute" in refusal(tmp_path / "a.pth", load)
    assert not (tmp_path / "executed").exists()


class Wrapped(torch.nn.Module):
    """A kind of object that no loader of weights alone takes."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            self.register_buffer(name.replace(".", "_"), value)


@pytest.mark.parametrize("new", [True, False])
def test_plain_data_beside_weights_is_left_out_without_making_it(new, tmp_path):
    beside = {
        "args": Namespace(output_dir=PosixPath("/runs"), began=datetime(2026, 1, 1)),
        "metrics": {"acc1": np.float64(1), "epoch": np.int64(3), "ok": np.bool_(True), "kind": np.dtype("float32")},
    }
    state = create_teacher("DeiT-Micro", 2, 32).state_dict()
    torch.save({"model": state, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    found = checkpoint.load(tmp_path / "a.pth")
    assert all(torch.equal(found["model"][name], value) for name, value in state.items())
    assert type(found["args"]) is type(found["metrics"]["acc1"]) is checkpoint.ForeignObject


@pytest.mark.parametrize(
    ("wrap", "module"), [(None, True), ("model", True), ("state_dict", True), ("model", False), ("state_dict", False)]
)
def test_the_recipe_for_a_refused_file_gives_one_that_is_taken(wrap, module, tmp_path):
    state = {"a.b": torch.ones(2), "c": torch.zeros(3)}
    weights = Wrapped(state) if module else state
    torch.save({wrap: weights, "other": Wrapped({})} if wrap else weights, tmp_path / "a.pth")
    with pytest.raises(FarError, match="refuses to execute") as error:
        checkpoint.load(tmp_path / "a.pth")
    code = re.search(r'python3 -c "(.*)"$', str(error.value))[1].replace("'FILE'", "'a.pth'")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = checkpoint.load(tmp_path / "weights.pth")
    assert sorted(found) == (["a_b", "c"] if module else ["a.b", "c"]) and found["c"].tolist() == [0, 0, 0]


def test_what_is_no_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "header").write_bytes((2**62).to_bytes(8, "little") + b"{" + b" " * 1000)
    (tmp_path / "short").write_bytes(b"PK\x03\x04")
    for name, said in (
        ("", "not a file"),
        ("fifo", "not a file"),
        ("loop", "symbolic links"),
        ("missing", "no such file"),
        ("n" * 300, "too long"),
        ("empty", "damaged"),
        ("header", "damaged"),
        ("short", "damaged"),
    ):
        path = tmp_path / name
        assert said in (refusal(path, checkpoint.load)[:200])

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert "permission denied" in refusal(tmp_path / "empty", checkpoint.load)


def test_a_storage_larger_than_its_file_is_refused(tmp_path):
    size = 4096
    torch.save({"x": torch.zeros(size)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for record in old.infolist():
            data = old.read(record)
            if record.filename.endswith("data.pkl"):
                data = data.replace(b"M\x00\x10", b"J\x00\x10\x00\x10")  # 4096 in two bytes: 268,439,552 in four
            new.writestr(record.filename, data)
    assert "damaged" in refusal(tmp_path / "b.pth", checkpoint.load)


def test_a_record_marked_as_a_folder_is_refused_not_left_to_what_memory_held(tmp_path):
    path = write(tmp_path / "a.pth", content())
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"archive/data/3PK") - 8] |= 0x10  # of the directory at the file's end, where torch looks
    path.write_bytes(raw)
    assert "damaged" in refusal(path)


# ---- teachers


def teacher_file(path, **changes):
    state = create_teacher("DeiT-Micro", 10, 32).state_dict()
    state = {**state, **changes}
    return write(path, {k: v for k, v in state.items() if v is not Ellipsis}), state


def into_teacher(path):
    model = create_teacher("DeiT-Micro", 10, 32)
    load_teacher_weights(model, path, "")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_ema": s},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {k: v.double() for k, v in s.items()},
    ],
)
def test_teachers_load_from_what_training_scripts_write(wrap, tmp_path):
    _, state = teacher_file(tmp_path / "a.pth")
    model = into_teacher(write(tmp_path / "b.pth", wrap(state)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pos_embed": torch.ones(65, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 66, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 1, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(2, 50, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 50, 63)}, "pos_embed has shape"),
        ({"pos_embed": torch.tensor(1.0)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 0, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 50, 64).long()}, "pos_embed"),
        ({"pos_embed": torch.ones(1).expand(1, 1 + 10**10, 64)}, "pos_embed has shape"),
        ({"pos_embed": [1]}, "pos_embed is a list"),
        ({"pos_embed": torch.full((1, 50, 64), math.nan)}, "pos_embed holds NaN"),
        ({"pos_embed": ...}, "no vision transformer"),
        ({"head.weight": torch.ones(10)}, "head.weight has shape"),
        ({"head.weight": torch.tensor(1.0)}, "head.weight has shape"),
        ({"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}, "7 classes"),
        ({"head.weight": ...}, "0 classes"),
        ({"head.bias": ...}, "lacks head.bias"),
        ({"norm.weight": ...}, "lacks norm.weight"),
        ({"norm.weight": 3}, "norm.weight is a int"),
        ({"norm.weight": torch.full((64,), math.nan)}, "norm.weight holds NaN"),
        ({"epoch": 3}, "epoch is a int"),
        (
            {"dist_token": torch.ones(1, 1, 64), "pos_embed": torch.ones(1, 66, 64), "head_dist.bias": torch.ones(10)},
            "distilled",
        ),
        ({"model": [torch.ones(1)]}, "no vision transformer"),
        ({"model": None}, "no vision transformer"),
        ({3: 4}, "3 is a int"),
    ],
)
def test_teacher_weights_of_another_kind_are_one_line(changes, said, tmp_path):
    path, _ = teacher_file(tmp_path / "a.pth", **{str(k): v for k, v in changes.items()})
    assert said in refusal(path, into_teacher)


def test_a_classifier_may_differ_only_where_a_fresh_one_is_asked_for(tmp_path):
    path, state = teacher_file(tmp_path / "a.pth", **{"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)})
    model = create_teacher("DeiT-Micro", 10, 32)
    before = model.head.weight.clone()
    load_teacher_weights(model, path, keep_head=False)
    assert torch.equal(model.head.weight, before) and torch.equal(model.cls_token, state["cls_token"])


@pytest.mark.parametrize(
    ("name", "size"), [("DeiT-Micro", 33), ("DeiT-Tiny", 33), ("DeiT-Micro", 0), ("DeiT-Tiny", 10**6)]
)
def test_sizes_that_would_cut_patches_off_are_refused(name, size, failure):
    with pytest.raises(FarError, match=f"--input-size {size}: {name} needs a multiple"):
        create_teacher(name, 10, size)


def test_a_size_that_would_cut_patches_off_ends_a_script_in_one_line(teacher, failure):
    line = failure(*TEACH, "--base-weight", teacher, "--epochs", "1", "--input-size", "33")
    assert "--input-size 33" in line


@pytest.mark.parametrize(
    "text", ["²", "1-²", "٣", "0--3", "0-1-2", "9" * 5000, "0-" + "9" * 5000, "+1", "1_0", "0x1", "1.0", "–1"]
)
def test_replace_refuses_what_only_looks_like_numbers(text):
    with pytest.raises(FarError, match="--replace"):
        parse_blocks(text, 12)


# ---- chance


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    saved = content()
    return write(tmp_path_factory.mktemp("real") / "a.pth", saved), saved


EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def places(value, path=()):
    """Every place in nested plain data, as keys from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def changed(value, place, new):
    """A copy with something else in one place; Ellipsis takes it out."""
    if not place:
        return new
    key, *rest = place
    if isinstance(value, dict):
        inner = changed(value[key], rest, new)
        return {k: inner if k == key else v for k, v in value.items() if not (k == key and inner is Ellipsis)}
    inner = changed(value[key], rest, new)
    return [inner if i == key else v for i, v in enumerate(value) if not (i == key and inner is Ellipsis)]


def check_file(path, saved):
    """The promise: the original's function, or one line."""
    try:
        assert same_function(path, saved)
    except FarError as error:
        assert str(path) in str(error)


@EXAMPLES
@given(data=st.data())
def test_any_change_of_a_configuration_gives_the_model_or_one_line(data, real, tmp_path):
    path, saved = tmp_path / "b.pth", copy.deepcopy(real[1])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(saved["config"])[1:] or [()]))
        new = data.draw(
            st.sampled_from([*HOSTILE, ..., *(v for v in saved["config"].values() if isinstance(v, str | int | tuple))])
        )
        saved["config"] = changed(saved["config"], place, new)
    check_file(write(path, saved), real[1])


@EXAMPLES
@given(data=st.data())
def test_any_damage_of_bytes_gives_the_model_or_one_line(data, real, tmp_path):
    raw = bytearray(real[0].read_bytes())
    chance = data.draw(st.randoms(use_true_random=False))
    # Nine tenths of a file are weights: half of the damage goes where its structure lies, at both ends.
    where = chance.choice([chance.randrange(len(raw)), chance.randrange(3000), len(raw) - 1 - chance.randrange(6000)])
    kind = data.draw(st.sampled_from(["truncate", "flip", "overwrite", "remove", "insert"]))
    size = chance.randrange(1, 40)
    if kind == "truncate":
        del raw[where:]
    elif kind == "flip":
        raw[where] ^= 1 << chance.randrange(8)
    elif kind == "overwrite":
        raw[where : where + size] = chance.randbytes(size)
    elif kind == "remove":
        del raw[where : where + size]
    else:
        raw[where:where] = chance.randbytes(size)
    path = tmp_path / "b.pth"
    path.write_bytes(raw)
    check_file(path, real[1])
