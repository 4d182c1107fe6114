"""What export.py does: a model becomes a file, the file is run where it will run, and only then takes its place."""

import copy
import importlib.metadata
import importlib.util
import json
import logging
import math
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from datasets.images import find_files, read_image
from datasets.loading import Data, DataConfig, preprocessing
from datasets.registry import SOURCES, Digits, photographs
from deploy.fuse import merge_blocks
from deploy.predict import preprocessing_of
from deploy.rivals import measure, open_onnx_runtime, open_openvino
from deploy.timing import PAUSE_S
from engine.steps import check_classes, check_named, load_any
from models.deit import find_teacher
from models.replace import FarConfig, describe, load_model, set_backend
from utils.checkpoint import save_safe, write_atomic
from utils.configs import ExportConfig
from utils.distributed import Context
from utils.errors import FarError, first_line
from utils.files import check_writable

BATCH = 32
TOLERANCE = 1e-4  # of the largest logit
TOLERANCE_INT8 = 0.3
DIGITS_SHOWN = 64
TIMED_S = 0.5
Call = Callable[[Tensor], Tensor]  # images (B, 3, S, S) to logits (B, classes)
Batch = tuple[Tensor, Tensor | None]  # images and their labels


@dataclass(frozen=True)
class Exported:
    """What goes into a file: a model in eval mode, its configuration with how images are prepared."""

    model: VisionTransformer
    config: FarConfig

    @property
    def data(self) -> dict[str, Any]:
        """How images are prepared, in timm's terms."""
        return {"input_size": (3, *self.model.patch_embed.img_size), **asdict(self.config.preprocessing)}

    def plain(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "data": self.data, "classes": self.config.classes}

    @property
    def architecture(self) -> str:
        """timm's name of it."""
        return "far_" * bool(self.config.replaced) + find_teacher(self.config.base_model).architecture


def read(asked: ExportConfig) -> Exported:
    """The model and what its checkpoint says of its images. Raises FarError where the flags name another model."""
    flag = "--far-weight" if asked.far_weight else "--base-weight"
    model, config = load_any(asked, asked.weight, flag, teacher=not asked.far_weight)
    check_named(asked, asked.weight, config)
    if config.preprocessing or not asked.dataset:
        seen = preprocessing_of(config)
    else:
        seen = preprocessing(DataConfig("", None, config.img_size), SOURCES[asked.dataset], config.reading)
    return Exported(model, describe(model, replace(config, preprocessing=seen)))


def write_onnx(exported: Exported, asked: ExportConfig, path: Path) -> str:
    """The model as an ONNX file. Returns what it holds, in words."""
    if not importlib.util.find_spec("onnx"):
        raise FarError("--to onnx: needs the package onnx; pip install onnx, or use --to pt2 or safetensors")
    from deploy.onnx_graph import to_onnx

    facts = {"architecture": exported.architecture, **exported.plain()}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    found = to_onnx(exported.model, asked.opset, texts)
    path.write_bytes(found.SerializeToString())
    if asked.int8:
        quantize(path)
    return f"opset {found.opset_import[0].version}, {len(found.graph.node)} nodes{' before int8' * asked.int8}"


def quantize(path: Path) -> None:
    """Weights of MatMul and LSTM in 8 bits, in place."""
    if not importlib.util.find_spec("onnxruntime"):
        raise FarError("--int8: needs the package onnxruntime; pip install onnxruntime, or leave it out")
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)  # it asks for a step that folds constants: there are none to fold
    try:
        quantize_dynamic(path, path, op_types_to_quantize=["MatMul", "LSTM"])
    finally:
        logging.disable(logging.NOTSET)


class Portable(nn.Module):
    """The merged form through torch's own LSTM, which torch.export can hold."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        model = copy.deepcopy(model)
        set_backend(model, "torch")
        self.model = merge_blocks(model)

    def forward(self, images: Tensor) -> Tensor:
        # torch.export switches oneDNN off, and then finds an LSTM's shapes by unrolling it token by token: minutes.
        with torch.backends.mkldnn.flags(enabled=True, allow_tf32=False):
            return self.model(images)


def write_pt2(exported: Exported, asked: ExportConfig, path: Path) -> str:
    """A program of torch's own operators, or compiled, batch dynamic."""
    model, facts = Portable(exported.model), {"far.json": json.dumps(exported.plain())}
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        program = torch.export.export(model, (torch.zeros(2, *exported.data["input_size"]),), dynamic_shapes=shapes)
        if not asked.aot:
            torch.export.save(program, path, extra_files=facts)
            return "a torch.export program"
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # noqa: BLE001  (Inductor and the compiler raise what they like; each means the same)
            raise FarError(f"--aot: cannot be compiled here ({first_line(error)}); leave it out") from error
    return "an AOTInductor package"


def write_safetensors(exported: Exported, asked: ExportConfig, path: Path) -> str:
    """Weights and configuration, and config.json as timm writes it for the hub."""
    model = exported.model
    beside = asked.file.with_name("config.json")
    if beside.exists() and not (beside.is_file() and '"far"' in beside.read_text(errors="replace")):
        raise FarError(f"--output {asked.file}: {beside} is there and not ours; name another folder")
    save_safe(path, model.state_dict(), {"config": asdict(exported.config)})
    fixed = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    hub = {
        "architecture": exported.architecture,
        "model_args": {"img_size": exported.config.img_size},
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {"num_classes": model.num_classes, **exported.data, **fixed},
        **({"label_names": exported.config.classes} if exported.config.classes else {}),
        "far": asdict(exported.config),
    }
    path.with_name("config.json").write_text(json.dumps(hub, indent=2) + "\n")
    return "weights and config.json"


def run_onnx_runtime(path: Path) -> Call:
    call = open_onnx_runtime(str(path), torch.get_num_threads())
    return lambda images: torch.from_numpy(call(images)[0])


def run_openvino(path: Path) -> Call:
    call = open_openvino(str(path), torch.get_num_threads())
    return lambda images: torch.from_numpy(call(images)[0])


@dataclass(frozen=True)
class Target:
    """write: (exported, asked, path) to a word on what it wrote. runs: where such a file runs, by package."""

    write: Callable[[Exported, ExportConfig, Path], str]
    runs: dict[str, Callable[[Path], Call]]


# What --to names; a new one is a line here and its name in utils.names.
TARGETS = {
    "onnx": Target(write_onnx, {"onnxruntime": run_onnx_runtime, "openvino": run_openvino}),
    "pt2": Target(write_pt2, {"torch": lambda path: torch.export.load(path).module()}),
    "safetensors": Target(write_safetensors, {"torch": lambda path: load_model(path)[0]}),
}


def runners(asked: ExportConfig) -> dict[str, Callable[[Path], Call]]:
    """Where the file will be run, by package; those that are not installed are said in one line."""
    runs = dict(TARGETS[asked.to].runs)
    if asked.aot:
        runs["torch"] = torch._inductor.aoti_load_package
    if asked.int8:
        del runs["openvino"]
        print("not checked in OpenVINO: int8 holds ONNX Runtime's own operators")
    for package in [p for p in runs if not importlib.util.find_spec(p)]:
        del runs[package]
        print(f"not checked in {package}: it is not installed")
    return runs


def pieces(image: Image.Image) -> list[Image.Image]:
    """The image and its quarters."""
    w, h = image.size
    corners = [(x, y) for x in (0, w // 2) for y in (0, h // 2)]
    return [image, *(image.crop((x, y, x + w // 2, y + h // 2)) for x, y in corners)]


def batches(asked: ExportConfig, exported: Exported) -> Iterable[Batch]:
    """The images that answers are compared on."""
    size = exported.config.img_size
    config = DataConfig(asked.dataset or "", asked.data_path, size, num_workers=0)
    if asked.dataset:
        found = Data(config, Context(), exported.config.preprocessing, trains=False)
        check_classes(str(asked.weight), exported.config, found, "name the data set it was trained on")
        yield from ((x, y if found.labelled else None) for x, y in found.val_loader(BATCH))
        return
    if asked.images:
        images: Iterable = map(read_image, find_files(asked.images))
    elif size <= 32:
        images = Digits(False).images[:DIGITS_SHOWN]
    else:
        images = [piece for photo in photographs().values() for piece in pieces(photo)]
    transform, left = exported.config.preprocessing.transform(size), iter(images)
    while some := [transform(image) for image in islice(left, BATCH)]:
        yield torch.stack(some), None


@dataclass
class Row:
    """What a runtime answers beside torch: images, same answers, right ones; largest difference; ms of one image."""

    call: Call
    same: int = 0
    right: int = 0
    difference: float = 0.0
    ms: float = 0.0

    def answer(self, images: Tensor, expected: Tensor) -> Tensor:
        found = self.call(images)
        gap = (found - expected).abs().max().item()
        self.difference = gap if math.isnan(gap) else max(self.difference, gap)  # a NaN stays: nothing is more
        return found


@torch.no_grad()
def compare(rows: dict[str, Row], found: Iterable[Batch]) -> tuple[int, bool, float]:
    """Fills the rows, the first of which is the reference: (images, whether labelled, the largest logit)."""
    count, largest, first = 0, 0.0, None
    reference = next(iter(rows.values())).call
    for images, labels in found:
        expected = reference(images)
        largest, count = max(largest, expected.abs().max().item()), count + len(images)
        for row in rows.values():
            top = row.answer(images, expected).argmax(1)
            row.same += top.eq(expected.argmax(1)).sum().item()
            row.right += 0 if labels is None else top.eq(labels).sum().item()
        first = images[:1].contiguous() if first is None else first
    for row in rows.values():
        row.answer(first, reference(first))  # alone: a batch may be computed in other ways
        time.sleep(PAUSE_S)  # pools of threads that still spin would spoil the next one's times
        row.ms = statistics.median(measure(lambda: row.call(first), TIMED_S))  # noqa: B023  (called within the turn)
    return count, labels is not None, largest


def check(asked: ExportConfig, exported: Exported, path: Path) -> None:
    """Runs the file where it will run and prints a table. Raises FarError where it is refused or differs."""
    rows = {"torch, this model": Row(exported.model)}
    for package, start in runners(asked).items():
        try:
            rows[f"{package} {importlib.metadata.version(package)}"] = Row(start(path))
        except Exception as error:  # noqa: BLE001  (each runtime raises its own types)
            raise FarError(f"--to {asked.to}: {package} refuses the file ({first_line(error)[:200]})") from error
    count, labelled, largest = compare(rows, batches(asked, exported))
    print(f"{'':24}difference  same top-1 %{'  top-1 %' * labelled}  ms, one image")
    for name, row in rows.items():
        top = f"{100 * row.right / count:9.2f}" if labelled else ""
        print(f"{name:24}{row.difference:10.1e}{100 * row.same / count:14.2f}{top}{row.ms:15.2f}")
    print(f"on {count} images, {torch.get_num_threads()} threads; the largest logit is {largest:.3g}")
    allowed = (TOLERANCE_INT8 if asked.int8 else TOLERANCE) * largest
    for name, row in rows.items():
        if not row.difference <= allowed:
            raise FarError(
                f"--to {asked.to}: in {name} logits differ by {row.difference:.2g}, allowed are {allowed:.2g}; nothing "
                "is written; try another --to, or without --int8"
            )


def export(asked: ExportConfig) -> Path:
    """Writes the file, checked; returns its path. Raises FarError, and then leaves nothing behind."""
    check_writable(asked.file.parent, "--output")
    exported = read(asked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / asked.file.name
        holds = TARGETS[asked.to].write(exported, asked, path)
        check(asked, exported, path)
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        for made in sorted(Path(folder).iterdir()):
            with made.open("rb") as source:
                write_atomic(asked.file.parent / made.name, lambda file: shutil.copyfileobj(source, file))  # noqa: B023
        holds = f"{exported.architecture} at {exported.config.img_size} px, {holds}"
        print(f"{asked.file}: {holds}, {asked.file.stat().st_size / 1e6:.1f} MB")
    return asked.file
