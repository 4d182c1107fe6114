"""Checkpoints: tensors and plain data, written atomically, never unpickled."""

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from utils import distributed
from utils.errors import FarError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FOLDER = 0x10  # MS-DOS's attribute, which zip files have kept
METADATA_KEY = "far"  # where the metadata of a safetensors file hold our plain data
# Keys under which training scripts store the weights. `model` comes before its moving average: it is what such a script
# evaluates and reports, and what DeiT's published files hold.
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
PREFIXES = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # DataParallel's and torch.compile's
RECIPE = (  # for a file that holds a pickled model, weights, or either under one of the first two keys
    "import torch; m = torch.load('FILE', 'cpu', weights_only=False); "
    "m = m.get('model', m.get('state_dict', m)) if isinstance(m, dict) else m; "
    "torch.save(m if isinstance(m, dict) else m.state_dict(), 'weights.pth')"
)


class ForeignObject:
    """Stands for an object that a training script stored beside the weights; its content is dropped."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Types of plain data beside the weights that torch's weights_only loader refuses: flags, dates, paths, NumPy scalars.
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
BESIDE_WEIGHTS = (
    *("argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta"),
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in PATHS),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
)


def write_atomic(path: Path, write) -> None:
    """Calls `write(file)` on a file in memory, which then replaces `path`: readers see the old or the new file.

    Raises:
        FarError: the disk is full, or the folder is missing or read-only; the old file stays, and nothing beside it.
    """
    path = Path(path)
    # In memory first: a format's own writer meets a full disk with an error of its own, or with none.
    content = io.BytesIO()
    write(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FarError(f"{path}: cannot be written ({error.strerror}); make room or name another folder") from error


def write_json(path: Path, content: Any) -> None:
    """Writes an indented JSON file. Raises `write_atomic`'s FarError."""
    write_atomic(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def append(path: Path, lines: bytes) -> None:
    """Adds to a file of lines. A kill may cut the last one, which `utils.records.read_lines` drops. Raises FarError."""
    try:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FarError(f"{path}: cannot be written ({error.strerror}); make room or name another folder") from error


def save(path: Path, content: dict[str, Any]) -> None:
    """Saves a dictionary of tensors and plain data. Raises `write_atomic`'s FarError."""
    write_atomic(path, lambda file: torch.save(content, file))


def save_safe(path: Path, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Saves tensors, and plain data in the metadata, as safetensors; `load` returns both."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt", METADATA_KEY: json.dumps(plain)})


def load(path: str | Path, flag: str = "") -> dict[str, Any]:
    """Loads a torch (weights only) or safetensors file onto the CPU; the format is told by content, not by name.

    In a distributed run rank 0 reads the file for all.

    Args:
        path: the file.
        flag: the flag the user named it with, for the message.

    Raises:
        FarError: no file, damaged, or a pickle of more than tensors and plain data (refused, never executed).
    """
    source = f"{flag} {path}".strip()
    return distributed.load_from_rank_0(lambda file: parse(file, source), Path(path))


def parse(path: Path, source: str) -> dict[str, Any]:
    """`load` in this process. source: how messages name the file."""
    try:
        if path.exists() and not path.is_file():  # opening a FIFO would block
            raise FarError(f"{source}: not a file; name a checkpoint, such as a run's best.pth")
        file = path.open("rb")
    except OSError as error:
        raise FarError(f"{source}: {error.strerror.lower()}; check the path") from error
    try:
        with file:
            head = file.read(9)
            file.seek(0)
            if head[8:] == b"{":  # safetensors: the header's length in eight bytes, then JSON
                with safetensors.safe_open(path, "pt") as opened:
                    plain = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
                tensors = safetensors.torch.load_file(path)
                return {**plain, "model": tensors} if plain else tensors
            if head.startswith(b"PK\x03\x04"):
                # torch stores checksums and does not compare them, and of a record marked as a folder it reads nothing,
                # leaving in the tensor whatever was in memory: a flipped bit would load. It does not compress.
                with zipfile.ZipFile(file) as archive:
                    odd = [r for r in archive.infolist() if r.compress_type or r.external_attr & FOLDER]
                    if odd or archive.testzip():
                        raise zipfile.BadZipFile
                file.seek(0)
            with torch.serialization.safe_globals([(ForeignObject, name) for name in BESIDE_WEIGHTS]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise FarError(
                f"{source}: holds pickled Python objects (or is damaged), which FAR refuses to execute; if you trust "
                f'it, save its weights where the code that wrote it is: python3 -c "{RECIPE}"'
            ) from error
        raise FarError(f"{source}: not a checkpoint, or damaged; copy or train it again") from error
    except Exception as error:  # noqa: BLE001  (parsers of damaged bytes raise a dozen unrelated types)
        raise FarError(f"{source}: truncated, damaged or not a checkpoint; copy or train it again") from error
    if not isinstance(content, dict):
        raise FarError(f"{source}: holds a {type(content).__name__}, not a dictionary of weights; save a state_dict")
    return content


def weights_of(content: dict[str, Any]) -> dict[str, Any]:
    """A model's state dict without the keys and prefixes of the script that wrote it; values unchecked."""
    state = next((content[key] for key in WRAPPERS if key in content), content)
    return {PREFIXES.sub("", str(key), 1): value for key, value in state.items()} if isinstance(state, dict) else {}


def check_dense(value: Any, dtypes: tuple[torch.dtype, ...], name: str, source: str) -> None:
    """Raises FarError unless `value` is a dense tensor of one of these types."""
    if not isinstance(value, Tensor):
        raise FarError(f"{source}: {name} is a {type(value).__name__}, not a tensor; save a state_dict of tensors")
    if value.dtype not in dtypes or value.layout != torch.strided:
        kind = f"{value.dtype}, {value.layout}".replace("torch.", "")
        raise FarError(f"{source}: {name} is a tensor of another kind ({kind}); save it dense, as float32")


def check_tensor(value: Any, like: Tensor, name: str, source: str) -> None:
    """Raises FarError unless `value` has the shape and kind of number of `like`, and is finite in its precision."""
    check_dense(value, FLOATS if like.is_floating_point() else (like.dtype,), name, source)
    if value.shape != like.shape:
        raise FarError(
            f"{source}: {name} has shape {tuple(value.shape)}, this model needs {tuple(like.shape)}; "
            "name the model and the data set the weights belong to"
        )
    value = value.detach().to(like.dtype)
    if not value.isfinite().all():
        kind = "NaN" if value.isnan().any() else "infinity"
        raise FarError(f"{source}: {name} holds {kind}; copy it again, or train again from an earlier checkpoint")


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
    """Raises FarError unless `state` holds the tensors of `expected` and no others, by name, shape and kind."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys(), key=str)
    if missing or extra:
        first = f"lacks {missing[0]}" if missing else f"holds {extra[0]!s:.80} besides"
        raise FarError(f"{source}: weights of another architecture ({first}); name the model they belong to")
    for name, tensor in expected.items():
        check_tensor(state[name], tensor, name, source)


def load_into(module: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict`, strict, with the first difference as one line. A module on meta takes copies."""
    expected = module.state_dict()
    check_state(expected, state, source)
    assign = any(tensor.is_meta for tensor in expected.values())
    if assign:  # copies: a file's tensors may share memory with each other
        state = {
            name: state[name].detach().to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in expected.items()
        }
    module.load_state_dict(dict(state), assign=assign)
