"""A checkpoint gives back its model or one clear line; nothing in it is executed; a command opens each file once."""

import math
import os
import re
from argparse import Namespace
from pathlib import PosixPath

import numpy as np
import pytest
import safetensors.torch
import torch

import main
from models.deit import create_teacher
from models.replace import FarConfig, build, load_model, pack, parse_blocks
from models.weights import load_teacher_weights, read
from tests.conftest import BATCH, BLOCK_BATCH, DIGITS, EVAL, run_ranks
from utils import checkpoint
from utils.errors import FarError

FAR = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), units={"2": [[3, 32], [32, 1]]}, mlp={"1": 40})


@pytest.fixture
def content():
    """A FAR checkpoint's content with fresh weights."""
    return pack(build(FAR), FAR)


@pytest.fixture(scope="module")
def state():
    """A teacher's state dict."""
    return create_teacher("DeiT-Micro", 10, 32).state_dict()


def write(path, value):
    torch.save(value, path)
    return path


def refusal(path, load=load_model):
    """The one line that loading this file gives, without the file's name."""
    with pytest.raises(FarError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line, line
    return line.removeprefix(f"{path}: ")


def test_a_checkpoint_gives_back_its_model_in_memory_of_its_own(content, tmp_path):
    content["model"]["blocks.0.norm1.bias"] = content["model"]["blocks.1.norm1.bias"]  # shared, as torch.save keeps it
    model, config = load_model(write(tmp_path / "a.pth", content))
    expected = build(FAR).eval()
    expected.load_state_dict(content["model"])
    images = torch.randn(2, 3, 32, 32)
    assert config == FAR and not model.training and torch.equal(model(images), expected(images))
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"} and all(p.requires_grad for p in model.parameters())
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 11}, r"head\.weight has shape"),
        ({"num_classes": 10.5}, "weights of no model here"),
        ({"img_size": 36}, "pos_embed has shape"),
        ({"img_size": 33}, "weights of no model here"),
        ({"base_model": "DeiT-Huge"}, "configuration is damaged: DeiT-Huge"),
        ({"base_model": ["DeiT-Micro"]}, "configuration is damaged"),
        ({"base_model": "DeiT-Tiny", "units": {}}, "another architecture"),
        ({"rep_by": "mixer", "units": {}}, "another architecture"),
        ({"replaced": (0, 2, 9)}, "weights of no model here"),
        ({"replaced": (0, 1, 2)}, "another architecture"),
        ({"units": {"2": [[3, 32], [32, 33]]}}, "units must be from 1 to"),
        ({"units": {"2": [[3, 32], [31, 1]]}}, r"lstm\.1\.0\.weight_ih has shape"),
        ({"units": 3}, "configuration is damaged"),
        ({"mlp": {"1": 41}}, "has shape"),
        ({"classes": ("a", "b")}, "classes must be 10 names, or none"),
        ({"preprocessing": {"mean": 0.5}}, "mean and std must be three numbers"),
        ({"surprise": 1}, "not a FAR checkpoint"),
    ],
)
def test_a_configuration_that_its_weights_do_not_have_is_one_line(change, message, content, tmp_path):
    content["config"].update(change)
    assert re.search(message, refusal(write(tmp_path / "a.pth", content)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(64, 40), "has shape"),
        (torch.ones(40, 64, dtype=torch.int64), "int64"),
        (torch.ones(40, 64, dtype=torch.complex64), "complex64"),
        (torch.full((40, 64), math.nan), "holds NaN"),
        (torch.full((40, 64), 1e200, dtype=torch.float64), "holds infinity"),
        ([1.0], "is a list"),
    ],
)
def test_weights_that_are_no_finite_floats_are_named(value, message, content, tmp_path):
    content["model"]["blocks.1.mlp.fc1.weight"] = value
    line = refusal(write(tmp_path / "a.pth", content))
    assert "blocks.1.mlp.fc1.weight" in line and message in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, content, tmp_path):
    content["model"] = {name: value.to(dtype) for name, value in content["model"].items()}
    model, _ = load_model(write(tmp_path / "a.pth", content))
    assert all(torch.equal(value, content["model"][name].float()) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# ---- files


def test_the_format_is_told_by_content_not_by_name(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "a.safetensors", "legacy.pth"):
        loaded = checkpoint.load(tmp_path / name)
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


def test_safetensors_keep_plain_data_beside_tensors(tmp_path):
    checkpoint.save_safe(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"config": {"num_classes": 3}})
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert loaded["config"] == {"num_classes": 3} and torch.equal(loaded["model"]["x"], torch.ones(2))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load", [load_model, read])
def test_a_payload_is_refused_and_not_executed(zipped, load, content, tmp_path):
    saved = {**content, "position": Payload(tmp_path / "executed")}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert "refuses to execute" in refusal(tmp_path / "a.pth", load)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"model": m}, lambda m: {"state_dict": m.state_dict(), "x": m}]
)
def test_the_recipe_for_a_refused_file_gives_one_that_loads(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(torch.nn.Linear(2, 3)), "a.pth")
    with pytest.raises(FarError, match="refuses to execute") as error:
        checkpoint.load("a.pth")
    exec(re.search(r'python3 -c "(.*)"$', str(error.value))[1].replace("FILE", "a.pth"))
    assert checkpoint.load("weights.pth").keys() == {"weight", "bias"}


def test_plain_data_of_training_scripts_beside_the_weights_is_dropped(state, tmp_path):
    beside = {"args": Namespace(output_dir=PosixPath("/runs")), "best": np.float64(1), "kind": np.dtype("float32")}
    weights = read(write(tmp_path / "a.pth", {"model": state, **beside}))
    assert weights.config is None and all(torch.equal(weights.state[name], value) for name, value in state.items())


def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    raw = bytearray(write(tmp_path / "a.pth", content).read_bytes())
    (tmp_path / "short").write_bytes(raw[:5000])
    raw[len(raw) // 2] ^= 1  # in a tensor: torch itself would load it
    (tmp_path / "flipped").write_bytes(raw)
    raw[len(raw) // 2] ^= 1
    raw[raw.rindex(b"PK\1\2") + 38] ^= 0x10  # marks a record as a folder, of which torch would read nothing
    (tmp_path / "folder").write_bytes(raw)
    for name, message in {
        "": "not a file",
        "fifo": "not a file",
        "missing": "no such file",
        "n" * 300: "too long",
        "empty": "damaged",
        "short": "damaged",
        "flipped": "damaged",
        "folder": "damaged",
    }.items():
        assert message in refusal(tmp_path / name)


# ---- teachers


def into_teacher(path, **kwargs):
    model = create_teacher("DeiT-Micro", 10, 32)
    load_teacher_weights(model, read(path), **kwargs)
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_ema": s},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: v.double() for k, v in s.items()},
    ],
)
def test_teachers_load_from_what_training_scripts_write(wrap, state, tmp_path):
    model = into_teacher(write(tmp_path / "a.pth", wrap(state)))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


DISTILLED = {"dist_token": torch.ones(1, 1, 64), "pos_embed": torch.ones(1, 66, 64), "head_dist.bias": torch.ones(10)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": torch.ones(65, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 66, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 1, 64)}, "pos_embed has shape"),
        ({"pos_embed": torch.ones(1, 50, 63)}, "pos_embed has shape"),
        ({"pos_embed": [1]}, "pos_embed is a list"),
        ({"pos_embed": ...}, "no vision transformer"),
        ({"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}, "7 classes"),
        ({"head.weight": ...}, "0 classes"),
        ({"norm.weight": ...}, "lacks norm.weight"),
        ({"norm.weight": torch.full((64,), math.nan)}, "norm.weight holds NaN"),
        ({"epoch": 3}, "epoch is a int"),
        ({"blocks.0.attn.post_proj.bias": torch.ones(64)}, "is a FAR model, not a teacher"),
        (DISTILLED, "distilled"),
        ({"model": None}, "no vision transformer"),
    ],
)
def test_teacher_weights_of_another_kind_are_one_line(changes, message, state, tmp_path):
    changed = {name: value for name, value in {**state, **changes}.items() if value is not ...}
    assert message in refusal(write(tmp_path / "a.pth", changed), into_teacher)


def test_a_classifier_may_differ_only_where_a_fresh_one_is_asked_for(state, tmp_path):
    path = write(tmp_path / "a.pth", {**state, "head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)})
    model = into_teacher(path, keep_head=False)
    assert model.head.weight.shape == (10, 64) and torch.equal(model.cls_token, state["cls_token"])


@pytest.mark.parametrize("size", [33, 0, 10**6])
def test_sizes_that_would_cut_patches_off_are_refused(size):
    with pytest.raises(FarError, match=f"--input-size {size}: DeiT-Micro needs a multiple"):
        create_teacher("DeiT-Micro", 10, size)


@pytest.mark.parametrize("text", ["²", "0--3", "0-1-2", "9" * 5000, "+1", "1_0", "3-1", "12"])
def test_replace_refuses_what_is_no_block_or_range(text):
    with pytest.raises(FarError, match="--replace"):
        parse_blocks(text, 12)


# ---- once


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that checkpoints are read from."""
    names, parse = [], checkpoint.parse
    monkeypatch.setattr(checkpoint, "parse", lambda path, source: names.append(path.name) or parse(path, source))
    return names


def test_a_command_opens_each_file_once(opened, state, content, tmp_path):
    teacher, far = write(tmp_path / "teacher.pth", {"model": state}), write(tmp_path / "far.pth", content)
    attn = write(tmp_path / "attn.pth", pack(build(config := FarConfig("DeiT-Micro", 10, 32, replaced=(0,))), config))
    few = [*DIGITS, *BATCH, *BLOCK_BATCH, "--holdout", "0.02", "--epochs", "0", "--block-ft-epochs", "1"]
    weights = ["--base-weight", str(teacher), "--attn-weight", str(attn), "--replace", "0"]
    main.main(["--mode", "train", *few, *weights, "--output-dir", str(tmp_path / "run")])
    assert sorted(opened) == ["attn.pth", "best.pth", "teacher.pth"]  # best.pth is the run's own
    for flags in (["--base-weight", teacher], ["--base-weight", teacher, "--far-weight", far]):
        opened.clear()
        main.main(["--mode", "eval", *EVAL, "--holdout", "0.02", "--scale", "Micro", *map(str, flags)])
        assert sorted(opened) == sorted(path.name for path in flags[1::2])


SHARED = """
import sys
import torch.distributed as dist
from utils import checkpoint, distributed
from utils.errors import Echo, FarError
groups, send = [], dist.broadcast_object_list
dist.broadcast_object_list = lambda *args, **kwargs: groups.append(kwargs["group"]) or send(*args, **kwargs)
with distributed.joined(True, "cpu") as context:
    distributed.control_group = dist.new_group(backend="gloo")  # as beside NCCL: not the default group
    folder = sys.argv[1] if context.main else "/nowhere"
    assert checkpoint.load(f"{folder}/a.pth")["x"].tolist() == [1, 2]
    try:
        checkpoint.load(f"{folder}/damaged.pth")
    except FarError as error:
        assert "damaged" in str(error) and isinstance(error, Echo) != context.main
    else:
        raise AssertionError
    assert groups == [distributed.control_group] * 2
"""


def test_a_file_of_rank_0_alone_is_loaded_by_all_over_the_control_group(tmp_path):
    write(tmp_path / "a.pth", {"x": torch.tensor([1, 2])})
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04")
    done = run_ranks("-c", SHARED, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
