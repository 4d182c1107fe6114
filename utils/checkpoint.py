"""Checkpoints: tensors and plain data, written atomically, never unpickled."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from utils import distributed
from utils.errors import FarError


def write_atomic(path: Path, write) -> None:
    """Calls `write(file)` on a file in memory, which then replaces `path`: readers see the old file or the new one, whole.

    Raises:
        FarError: the disk is full, or the folder gone or closed; the old file stays, and nothing beside it.
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
        raise FarError(
            f"{path}: cannot be written ({error.strerror}); what was there before is kept; make room or name another folder"
        ) from error


def save(path: Path, content: dict[str, Any]) -> None:
    """Saves a dictionary of tensors and plain data. Raises `write_atomic`'s FarError."""
    write_atomic(path, lambda file: torch.save(content, file))


def load(path: str | Path, flag: str) -> dict[str, Any]:
    """Loads a `.pth` (weights only) or `.safetensors` file onto the CPU; of several processes, rank 0 reads for all.

    Args:
        path: the file.
        flag: the flag the user named it with, for the message.

    Raises:
        FarError: missing, truncated, or a pickle of more than tensors and plain data (refused, never executed).
    """
    return distributed.everywhere(lambda file: _load(file, flag), Path(path))


def _load(path: Path, flag: str) -> dict[str, Any]:
    if not path.is_file():
        raise FarError(f"{flag} {path}: no such file; check the path")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        if "Weights only load failed" in first or "Unsupported" in str(error):
            raise FarError(
                f"{flag} {path}: holds pickled Python objects (or is damaged), which FAR refuses to execute; "
                "save its state_dict with torch.save(model.state_dict(), FILE)"
            ) from error
        raise FarError(f"{flag} {path}: not a checkpoint, or damaged; copy or train it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise FarError(f"{flag} {path}: truncated or not a checkpoint; copy or train it again") from error
    if not isinstance(content, dict):
        raise FarError(f"{flag} {path}: holds a {type(content).__name__}, not a dictionary of weights; save a state_dict")
    return content


def load_into(module: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """`load_state_dict`, strict, with the first difference told in one line."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        first = f"lacks {missing[0]}" if missing else f"holds {extra[0]} besides"
        raise FarError(f"{source}: weights of another architecture ({first}); name the model they belong to")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise FarError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, this model needs {tuple(tensor.shape)}; "
                "name the model and the data set the weights belong to"
            )
    module.load_state_dict(state)
