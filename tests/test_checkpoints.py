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
from models.replace import FarConfig, build, load_model, pack
from models.weights import load_teacher_weights, read
from tests.conftest import BATCH, BLOCK_BATCH, DIGITS
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


def test_a_checkpoint_gives_back_its_model_as_float32_in_memory_of_its_own(content, tmp_path):
    weights = content["model"] = {name: value.double() for name, value in content["model"].items()}
    weights["blocks.0.norm1.bias"] = weights["blocks.1.norm1.bias"]  # shared, as torch.save keeps it
    model, config = load_model(write(tmp_path / "a.pth", content))
    assert config == FAR and not model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, weights[name].float()) for name, value in model.state_dict().items())
    tensors = [*model.parameters(), *model.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("cpu", torch.float32)}
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


WEIGHT = "blocks.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("config", {"num_classes": 11}, r"head\.weight has shape"),
        ("config", {"base_model": "DeiT-Huge"}, "configuration is damaged: DeiT-Huge"),
        ("config", {"rep_by": "mixer", "units": {}}, "another architecture"),
        ("config", {"replaced": (0, 2, 9)}, "weights of no model here"),
        ("config", {"units": {"2": [[3, 32], [32, 33]]}}, "units must be from 1 to"),
        ("config", {"classes": ("a", "b")}, "classes must be 10 names, or none"),
        ("config", {"surprise": 1}, "not a FAR checkpoint"),
        ("model", {WEIGHT: torch.ones(40, 64, dtype=torch.int64)}, f"{WEIGHT} .*int64"),
        ("model", {WEIGHT: torch.full((40, 64), math.nan)}, f"{WEIGHT} holds NaN"),
    ],
)
def test_a_configuration_or_weights_that_do_not_fit_are_one_line(part, change, message, content, tmp_path):
    content[part].update(change)
    assert re.search(message, refusal(write(tmp_path / "a.pth", content)))


# ---- files


def test_the_format_is_told_by_content_not_by_name(state, tmp_path):
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


@pytest.mark.parametrize(("load", "zipped"), [(load_model, True), (read, False)])
def test_a_payload_is_refused_and_not_executed(load, zipped, content, tmp_path):
    saved = {**content, "position": Payload(tmp_path / "executed")}
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert "refuses to execute" in refusal(tmp_path / "a.pth", load)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m}])
def test_the_recipe_for_a_refused_file_gives_one_that_loads(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(torch.nn.Linear(2, 3)), "a.pth")
    with pytest.raises(FarError, match="refuses to execute") as error:
        checkpoint.load("a.pth")
    exec(re.search(r'python3 -c "(.*)"$', str(error.value))[1].replace("FILE", "a.pth"))
    assert checkpoint.load("weights.pth").keys() == {"weight", "bias"}


def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    (tmp_path / "empty").touch()
    raw = bytearray(write(tmp_path / "a.pth", content).read_bytes())
    (tmp_path / "short").write_bytes(raw[:5000])
    raw[len(raw) // 2] ^= 1  # in a tensor: torch itself would load it
    (tmp_path / "flipped").write_bytes(raw)
    assert "not a file" in refusal(tmp_path) and "no such file" in refusal(tmp_path / "missing")
    for name in ("empty", "short", "flipped"):
        assert "damaged" in refusal(tmp_path / name)


# ---- teachers


def into_teacher(path):
    model = create_teacher("DeiT-Micro", 10, 32)
    load_teacher_weights(model, read(path))
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "args": Namespace(output_dir=PosixPath("/runs")), "best": np.float64(1)},
        lambda s: {"model": s, "model_ema": {k: v + 1 for k, v in s.items()}},
        lambda s: {"model_ema": {f"module._orig_mod.{k}": v for k, v in s.items()}},
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
        ({"pos_embed": torch.ones(1, 66, 64)}, "pos_embed has shape"),
        ({"pos_embed": ...}, "no vision transformer"),
        ({"head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}, "7 classes"),
        ({"norm.weight": ...}, "lacks norm.weight"),
        ({"blocks.0.attn.post_proj.bias": torch.ones(64)}, "is a FAR model, not a teacher"),
        (DISTILLED, "distilled"),
    ],
)
def test_teacher_weights_of_another_kind_are_one_line(changes, message, state, tmp_path):
    changed = {name: value for name, value in {**state, **changes}.items() if value is not ...}
    assert message in refusal(write(tmp_path / "a.pth", changed), into_teacher)


# ---- once


def test_a_command_opens_each_file_once(state, tmp_path, monkeypatch):
    opened, parse = [], checkpoint.parse
    monkeypatch.setattr(checkpoint, "parse", lambda path, source: opened.append(path.name) or parse(path, source))
    teacher = write(tmp_path / "teacher.pth", {"model": state})
    attn = write(tmp_path / "attn.pth", pack(build(config := FarConfig("DeiT-Micro", 10, 32, replaced=(0,))), config))
    few = [*DIGITS, *BATCH, *BLOCK_BATCH, "--train-subset", "0.02", "--epochs", "0", "--block-ft-epochs", "1"]
    weights = ["--base-weight", str(teacher), "--attn-weight", str(attn), "--replace", "0"]
    main.main(["--mode", "train", *few, *weights, "--output-dir", str(tmp_path / "run")])
    assert sorted(opened) == ["attn.pth", "best.pth", "teacher.pth"]  # best.pth is the run's own
