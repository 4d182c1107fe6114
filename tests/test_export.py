"""export.py: each file runs where it is meant to, and answers as the model does in float64."""

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

import export
import models.timm_models  # noqa: F401  (registers)
from datasets.loading import Data
from deploy.export import TARGETS, open_model
from deploy.onnx_graph import to_onnx
from deploy.predict import preprocessing_of
from models.hub import load
from models.replace import FarConfig, build, load_model, pack, set_backend
from tests.conftest import launch, randomize, report, write_images
from utils import checkpoint
from utils.configs import DataConfig, ExportConfig
from utils.distributed import Context
from utils.preprocessing import Preprocessing

DEPTH = 4
ALL = tuple(range(DEPTH))
UNLIKE = {str(i): [[5, 9], [32, 32]] for i in ALL}  # the second head's directions share a node
NAMES = tuple(f"digit {i}" for i in range(10))
SMALL = {str(i): [[3, 3], [4, 4]] for i in ALL}  # small enough for pre_proj to be merged
KINDS = {
    "FAR": {"replaced": ALL},
    "ragged": {"replaced": ALL, "units": UNLIKE},
    "merged": {"replaced": ALL, "units": SMALL},
    "partly replaced": {"replaced": (0, 2), "units": {"2": UNLIKE["2"]}},
    "pruned MLPs": {"replaced": (3,), "mlp": {"0": 7, "3": 50}},
    "teacher": {"mlp": {"2": 100}},
    "one head": {"replaced": ALL, "rep_by": "lstm"},
    "gru": {"replaced": ALL, "rep_by": "gru", "units": UNLIKE},
    "mingru": {"replaced": ALL, "rep_by": "mingru", "units": UNLIKE},
    "merged mingru": {"replaced": (0, 3), "rep_by": "mingru", "units": SMALL},
}


def micro(**kind) -> FarConfig:
    return FarConfig("DeiT-Micro", 10, 32, **kind)


def truth(model, images: torch.Tensor) -> torch.Tensor:
    """The model's answers in float64, by the plain loop over tokens."""
    set_backend(model, "reference")
    return model.double()(images.double())


def store(path: Path, config: FarConfig):
    model = randomize(build(config))
    checkpoint.save(path, pack(model, config))
    return model


@pytest.fixture(scope="module")
def far(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "far.pth"
    seen = Preprocessing((0.4,) * 3, (0.6,) * 3, 1.0, interpolation="bilinear")
    store(path, micro(**KINDS["ragged"], preprocessing=seen, classes=NAMES))
    return path


def run(capsys, *argv) -> str:
    assert export.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_answers_as_the_model_does(kind, tmp_path):
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    model = randomize(build(micro(**KINDS[kind])))
    files = {opset: to_onnx(model, opset, {}).SerializeToString() for opset in (17, 20)}
    sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files.values()]
    (tmp_path / "far.onnx").write_bytes(files[20])
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(tmp_path / "far.onnx", "CPU", options).create_infer_request()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        expected = truth(model, images).numpy()
        scale = max(1, np.abs(expected).max())
        for session in sessions:
            (logits,) = session.run(None, {"images": images.numpy()})
            assert np.abs(logits - expected).max() < 2e-6 * scale, batch
        assert np.abs(request.infer([images.numpy()])[0] - expected).max() < 1e-5 * scale


def test_the_graph_is_small_and_readable():
    graph = to_onnx(build(micro(**KINDS["FAR"])).eval(), 20, {}).graph
    count = {op: sum(node.op_type == op for node in graph.node) for op in {node.op_type for node in graph.node}}
    assert {node.domain for node in graph.node} == {""}
    assert count["LSTM"] == 2 * (DEPTH - 1) + 4  # a node a head; two for the class token's, of which one is a step
    assert count["Slice"] == 2 and "Constant" not in count and "Shape" not in count
    assert count["Transpose"] == DEPTH  # the patches' once, a block's states once, none in the last block
    names = [node.name for node in graph.node]
    assert "block1/head1/lstm" in names and len(set(names)) == len(names)
    assert {"block1/head1/lstm/W", "block0/fc1/W"} <= {weight.name for weight in graph.initializer}


def test_onnx_holds_what_a_user_must_know(far, tmp_path, capsys):
    output = tmp_path / "far.onnx"
    said = run(capsys, "--far-weight", far, "--to", "onnx", "--output", output, "--opset", 18)
    assert "onnxruntime" in said and "openvino" in said and "100.00" in said
    file = onnx.load(output)
    facts = {entry.key: entry.value for entry in file.metadata_props}
    data = json.loads(facts["data"])
    assert data["input_size"] == [3, 32, 32] and data["mean"] == [0.4] * 3 and data["interpolation"] == "bilinear"
    assert json.loads(facts["classes"])[3] == "digit 3" and json.loads(facts["config"])["units"] == UNLIKE
    assert facts["architecture"] == "far_deit_micro_patch4_32" and file.opset_import[0].version == 18
    shape = file.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 32, 32]
    assert left(tmp_path) == {"far.onnx"}


def test_pt2_runs_where_this_repository_is_not(tmp_path, capsys):
    """Of 17 tokens: each is a part of the program."""
    far, output = tmp_path / "far.pth", tmp_path / "far.pt2"
    units = {"1": UNLIKE["1"]}
    model = store(far, FarConfig("DeiT-Micro", 10, 16, replaced=(1, 3), units=units, mlp={"0": 7}, classes=NAMES))
    assert "torch" in run(capsys, "--far-weight", far, "--to", "pt2", "--output", output)
    images = torch.randn(5, 3, 16, 16)
    torch.save((images, truth(model, images)), tmp_path / "pair.pt")
    script = """
import importlib.util, json, torch
assert not importlib.util.find_spec("models")
facts = {"far.json": ""}
model = torch.export.load("far.pt2", extra_files=facts).module()
images, expected = torch.load("pair.pt")
assert json.loads(facts["far.json"])["classes"][3] == "digit 3"
for batch in (1, 5):
    assert (model(images[:batch]) - expected[:batch]).abs().max() < 2e-6 * expected.abs().max().clamp_min(1)
"""
    hide = "import sys; sys.modules['timm'] = None\n"  # installed, but not to be found
    done = launch("-c", hide + script, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_safetensors_come_back_as_they_were(far, tmp_path, capsys):
    output = tmp_path / "deep" / "far.safetensors"
    run(capsys, "--far-weight", far, "--to", "safetensors", "--output", output)
    (own, first), (model, config) = load_model(far), load_model(output)
    assert config == first and all(torch.equal(w, model.state_dict()[k]) for k, w in own.state_dict().items())
    hub = report(output.parent, "config.json")
    assert hub["num_classes"] == 10 and hub["num_features"] == 64 and hub["label_names"][0] == "digit 0"
    assert hub["pretrained_cfg"]["input_size"] == [3, 32, 32] and hub["far"]["replaced"] == list(ALL)
    assert hub["pretrained_cfg"]["std"] == [0.6] * 3 and config.classes[9] == "digit 9"


def test_int8_is_checked_on_the_data_set_given(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    store(tmp_path / "far.pth", micro(**KINDS["FAR"]))
    said = run(capsys, "--far-weight", tmp_path / "far.pth", "--to", "onnx", "--int8", "--dataset", "DIGITS")
    ops = {node.op_type for node in onnx.load(tmp_path / "far-int8.onnx").graph.node}
    assert {"MatMulInteger", "DynamicQuantizeLSTM"} <= ops and not {"MatMul", "LSTM"} & ops
    assert "on 360 images" in said and "not checked in OpenVINO" in said
    rows = [line.split() for line in said.splitlines() if re.match("torch,|onnxruntime", line)]
    assert len(rows) == 2 and abs(float(rows[0][-2]) - float(rows[1][-2])) < 5  # top-1 of both
    assert float(rows[1][-3]) > 90 and (tmp_path / "far-int8.onnx").stat().st_size < 0.5e6


def test_images_may_be_named_and_absent_runtimes_are_said(far, tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "pictures", 3)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    flags = ("--to", "onnx", "--images", tmp_path / "pictures", "--output", tmp_path / "far.onnx")
    said = run(capsys, "--far-weight", far, *flags)
    assert "on 3 images" in said and "not checked in openvino: it is not installed" in said


def test_one_image_alone_counts_too_and_nan_is_no_small_difference(far, failure, tmp_path, monkeypatch):
    ours, output = load_model(far)[0], tmp_path / "far.onnx"

    def alone(path):
        return lambda images: ours(images).detach() + (len(images) == 1)

    def nan(path):
        return lambda images: ours(images).detach() * float("nan")

    def refused(path):
        raise RuntimeError("no such operator\nand much more")

    for start, says in (
        (alone, "logits differ by 1"),
        (nan, "logits differ by nan"),
        (refused, "onnxruntime refuses the file (no such operator)"),
    ):
        monkeypatch.setitem(TARGETS["onnx"].runtimes, "onnxruntime", start)
        assert says in failure("--far-weight", far, "--to", "onnx", "--output", output, script=export.main)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install onnx" in failure("--far-weight", far, "--to", "onnx", "--output", output, script=export.main)
    assert not left(tmp_path)


def test_how_images_are_read_where_no_checkpoint_says_is_one_answer_everywhere(tmp_path, caplog):
    old = tmp_path / "far.pth"
    store(old, micro(**KINDS["merged"]))
    flags = {"to": "safetensors", "far_weight": old}
    assert open_model(ExportConfig(**flags))[1].preprocessing == Preprocessing() and "ImageNet" in caplog.text
    assert preprocessing_of(load_model(old)[1]) == Preprocessing()
    hub = load(old).pretrained_cfg
    assert all(hub[name] == value for name, value in asdict(Preprocessing()).items())
    digits = open_model(ExportConfig(**flags, dataset="DIGITS"))[1].preprocessing
    assert digits == Data(DataConfig("DIGITS", None, 32), Context()).preprocessing != Preprocessing()


def test_timm_makes_the_model_of_an_exported_folder(tmp_path, capsys):
    size = 64  # not the architecture's own
    seen = Preprocessing((0.4,) * 3, (0.6,) * 3, 1.0, interpolation="bilinear")
    config = FarConfig("DeiT-Tiny", 3, size, replaced=(0, 11), units={"0": [[3, 4]] * 3}, preprocessing=seen)
    model = store(tmp_path / "far.pth", config)
    write_images(tmp_path / "pictures", 1)
    flags = ("--output", tmp_path / "model.safetensors", "--images", tmp_path / "pictures")
    assert f"far_deit_tiny_patch16_224 at {size} px" in run(
        capsys, "--far-weight", tmp_path / "far.pth", "--to", "safetensors", *flags
    )
    theirs, images = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(theirs(images), model(images))
    data = timm.data.resolve_model_data_config(theirs)
    assert data == {"input_size": (3, size, size), **{name: data[name] for name in asdict(seen)}}
    assert Preprocessing.read({name: data[name] for name in asdict(seen)}) == seen


def test_a_config_of_something_else_is_not_overwritten(far, failure, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flags = ("--to", "safetensors", "--output", tmp_path / "far.safetensors")
    assert "config.json is there and not ours" in failure("--far-weight", far, *flags, script=export.main)
    assert left(tmp_path) == {"config.json"} and (tmp_path / "config.json").read_text() == "{}"
