"""Exports a model as a file that is run in its runtimes, and compared with the model, before it takes its place."""

import copy
import importlib.metadata
import importlib.util
import json
import logging
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

from datasets.classes import check_classes
from datasets.images import find_files, read_image
from datasets.loading import Data, preprocessing
from datasets.registry import SOURCES, Digits, photographs
from deploy import engine_file
from deploy.fuse import merge_blocks
from deploy.packed import PRECISIONS, fault, natural_form
from deploy.predict import preprocessing_of
from deploy.rivals import open_onnx_runtime, open_openvino
from deploy.timing import PAUSE_S, measure
from models.deit import find_teacher
from models.replace import FarConfig, count_parameters, describe, load_model, set_backend
from models.weights import load_any
from utils.checkpoint import save_safe, write_atomic
from utils.configs import DataConfig, ExportConfig
from utils.distributed import Context
from utils.errors import FarError, first_line, require
from utils.files import check_writable
from utils.terminal import table

BATCH, DIGITS = 32, 64  # images a batch, and of the digits
TOLERANCE, ROUNDED = 1e-4, {"int8": 0.3, "bfloat16": 0.05}  # of the largest logit
TIMED_S = 0.5
Call = Callable[[Tensor], Tensor]  # images (B, 3, S, S) to logits (B, classes)


def write_onnx(model: VisionTransformer, facts: dict[str, Any], args: ExportConfig, path: Path) -> str:
    require("--to onnx", "onnx", ", or use --to pt2 or safetensors")
    if args.int8:
        require("--int8", "onnxruntime", ", or leave it out")
    from deploy.onnx_graph import to_onnx

    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    onnx_model = to_onnx(model, args.opset, texts)
    path.write_bytes(onnx_model.SerializeToString())
    if args.int8:
        from onnxruntime.quantization import quantize_dynamic

        logging.disable(logging.WARNING)  # it asks for a step that folds constants: there are none to fold
        try:
            quantize_dynamic(path, path, op_types_to_quantize=["MatMul", "LSTM"])
        finally:
            logging.disable(logging.NOTSET)
    return f"opset {onnx_model.opset_import[0].version}, {len(onnx_model.graph.node)} nodes{' before int8' * args.int8}"


class Portable(nn.Module):
    """The merged form through torch's own LSTM, which torch.export can hold."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        model = copy.deepcopy(model)
        set_backend(model, "torch")
        self.model = merge_blocks(model)

    def forward(self, images: Tensor) -> Tensor:
        # torch.export switches oneDNN off, and then traces an LSTM token by token, which takes minutes.
        with torch.backends.mkldnn.flags(enabled=True, allow_tf32=False):
            return self.model(images)


def write_pt2(model: VisionTransformer, facts: dict[str, Any], args: ExportConfig, path: Path) -> str:
    images, shapes = torch.zeros(2, *facts["data"]["input_size"]), ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        program = torch.export.export(Portable(model), (images,), dynamic_shapes=shapes)
        if not args.aot:
            torch.export.save(program, path, extra_files={"far.json": json.dumps(facts)})
            return "a torch.export program"
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # noqa: BLE001  (Inductor and the compiler raise what they like; each means the same)
            raise FarError(f"--aot: cannot be compiled here ({first_line(error)}); leave it out") from error
    return "an AOTInductor package"


def write_safetensors(model: VisionTransformer, facts: dict[str, Any], args: ExportConfig, path: Path) -> str:
    """Weights and configuration, and config.json as timm writes it for the hub."""
    beside = args.file.with_name("config.json")
    if beside.exists() and not (beside.is_file() and '"far"' in beside.read_text(errors="replace")):
        raise FarError(f"--output {args.file}: {beside} is there and not ours; name another folder")
    save_safe(path, model.state_dict(), {"config": facts["config"]})
    fixed = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    hub = {
        "architecture": facts["architecture"],
        "model_args": {"img_size": facts["config"]["img_size"]},
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {"num_classes": model.num_classes, **facts["data"], **fixed},
        **({"label_names": facts["classes"]} if facts["classes"] else {}),
        "far": facts["config"],
    }
    path.with_name("config.json").write_text(json.dumps(hub, indent=2) + "\n")
    return "weights and config.json"


def write_engine(model: VisionTransformer, facts: dict[str, Any], args: ExportConfig, path: Path) -> str:
    if reason := fault(model):
        raise FarError(f"--to engine: {reason}; use --to pt2 or safetensors")
    facts = {**facts, "parameters": count_parameters(model)}
    path.write_bytes(engine_file.to_bytes(natural_form(model, PRECISIONS[args.precision]), facts))
    return f"a file for far-run, {args.precision}"


@dataclass(frozen=True)
class Target:
    """write: writes a file and returns what it holds, in words. runtimes: what opens such a file, by `look_up`."""

    write: Callable[[VisionTransformer, dict[str, Any], ExportConfig, Path], str]
    runtimes: dict[str, Callable[[Path], Call]]


FAR_RUN = "far-run"
# What --to names; a new one is a line here and its name in utils.names.
TARGETS = {
    "onnx": Target(write_onnx, {"onnxruntime": open_onnx_runtime, "openvino": open_openvino}),
    "pt2": Target(write_pt2, {"torch": lambda path: torch.export.load(path).module()}),
    "safetensors": Target(write_safetensors, {"torch": lambda path: load_model(path)[0]}),
    "engine": Target(write_engine, {FAR_RUN: engine_file.run_program}),
}


def look_up(runtime: str) -> tuple[str, str]:
    """A runtime as the table names it, and why it is not here."""
    if runtime == FAR_RUN:
        return f"{FAR_RUN}, started each time", engine_file.why_no_program()
    if not importlib.util.find_spec(runtime):
        return runtime, "it is not installed"
    return f"{runtime} {importlib.metadata.version(runtime)}", ""


def open_model(args: ExportConfig) -> tuple[VisionTransformer, FarConfig]:
    """The model, and its configuration with how images are prepared. Raises FarError where the flags contradict it."""
    flag = "--far-weight" if args.far_weight else "--base-weight"
    model, config = load_any(args, args.weight, flag, teacher=not args.far_weight)
    if config.preprocessing or not args.dataset:
        prepared = preprocessing_of(config)
    else:
        prepared = preprocessing(
            DataConfig("", None, config.img_size), SOURCES[args.dataset], config.expected_preprocessing
        )
    return model, describe(model, replace(config, preprocessing=prepared))


def batches(args: ExportConfig, config: FarConfig) -> Iterable[tuple[Tensor, Tensor | None]]:
    """The images (B, 3, S, S) that logits are compared on, with labels where --dataset has them."""
    size = config.img_size
    if args.dataset:
        data = Data(
            DataConfig(args.dataset, args.data_path, size, num_workers=0),
            Context(),
            config.expected_preprocessing,
            trains=False,
        )
        check_classes(str(args.weight), config, data, "name the data set it was trained on")
        yield from ((images, labels if data.labelled else None) for images, labels in data.val_loader(BATCH))
        return
    if args.images:
        images: Iterable[Image.Image] = map(read_image, find_files(args.images))
    elif size <= 32:
        images = Digits(False).images[:DIGITS]
    else:  # two photographs and their quarters
        images = []
        for photo in photographs().values():
            w, h = photo.width // 2, photo.height // 2
            images += [photo, *(photo.crop((x, y, x + w, y + h)) for x in (0, w) for y in (0, h))]
    transform, left = config.preprocessing.transform(size), iter(images)
    while batch := [transform(image) for image in islice(left, BATCH)]:
        yield torch.stack(batch), None


@torch.no_grad()
def check(args: ExportConfig, model: VisionTransformer, config: FarConfig, path: Path) -> None:
    """Runs the file in its runtimes and prints a table. Raises FarError where one refuses it or differs."""
    runtimes = dict(TARGETS[args.to].runtimes)
    if args.aot:
        runtimes["torch"] = torch._inductor.aoti_load_package
    if args.int8:
        del runtimes["openvino"]
        print("not checked in OpenVINO: int8 holds ONNX Runtime's own operators")
    calls: dict[str, Call] = {"torch, this model": model}
    for runtime, start in runtimes.items():
        name, lacks = look_up(runtime)
        if lacks:
            print(f"not checked in {runtime}: {lacks}")
            continue
        try:
            calls[name] = start(path)
            calls[name](torch.zeros(1, 3, config.img_size, config.img_size))  # some read the file only now
        except Exception as error:  # noqa: BLE001  (each runtime raises its own types)
            raise FarError(f"--to {args.to}: {runtime} refuses the file ({first_line(error)[:200]})") from error

    gaps: dict[str, list[Tensor]] = {name: [] for name in calls}
    same, right = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0)
    count, largest, first, labelled = 0, 0.0, None, False
    for images, labels in batches(args, config):
        expected = model(images)
        count, largest = count + len(images), max(largest, expected.abs().max().item())
        first, labelled = images[:1].contiguous() if first is None else first, labels is not None
        for name, call in calls.items():
            logits = call(images)
            gaps[name].append((logits - expected).abs().max())
            same[name] += logits.argmax(1).eq(expected.argmax(1)).sum().item()
            right[name] += logits.argmax(1).eq(labels).sum().item() if labelled else 0
    rows = [["", "difference", "same top-1 %", *["top-1 %"] * labelled, "ms, one image"]]
    for name, call in calls.items():
        gaps[name].append((call(first) - model(first)).abs().max())  # one image may be computed in another way
        time.sleep(PAUSE_S)  # pools of threads that still spin would spoil the next one's times
        ms = statistics.median(measure(lambda: call(first), TIMED_S))  # noqa: B023  (called within the turn)
        shares = [f"{100 * part[name] / count:.2f}" for part in (same, right)[: 1 + labelled]]
        rows.append([name, f"{torch.stack(gaps[name]).max():.1e}", *shares, f"{ms:.2f}"])
    print(table(rows))
    print(f"on {count} images, {torch.get_num_threads()} threads; the largest logit is {largest:.3g}")
    allowed = ROUNDED.get("int8" if args.int8 else args.precision, TOLERANCE) * largest
    for name in calls:
        if not (gap := torch.stack(gaps[name]).max().item()) <= allowed:  # NaN, too, which max() keeps
            raise FarError(
                f"--to {args.to}: in {name} logits differ by {gap:.2g}, allowed are {allowed:.2g}; nothing is written; "
                "try another --to, or weights that are not rounded (no --int8, --precision float32)"
            )


def export(args: ExportConfig) -> Path:
    """Writes the file, checked; returns its path. Raises FarError, and then leaves nothing behind."""
    check_writable(args.file.parent, "--output")
    model, config = open_model(args)
    facts = {
        "architecture": "far_" * bool(config.replaced) + find_teacher(config.base_model).architecture,  # timm's name
        "config": asdict(config),
        "data": {"input_size": (3, *model.patch_embed.img_size), **asdict(config.preprocessing)},
        "classes": config.classes,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / args.file.name
        contents = TARGETS[args.to].write(model, facts, args, path)
        check(args, model, config, path)
        args.file.parent.mkdir(parents=True, exist_ok=True)
        for made in sorted(Path(folder).iterdir()):
            with made.open("rb") as source:
                write_atomic(args.file.parent / made.name, lambda file: shutil.copyfileobj(source, file))  # noqa: B023
    size = args.file.stat().st_size / 1e6
    print(f"{args.file}: {facts['architecture']} at {config.img_size} px, {contents}, {size:.1f} MB")
    return args.file
