"""Lets torchvision be imported beside a torch its compiled operators were not built for (a CPU-only torch, say).

`import torchvision` registers fake kernels for `torchvision::nms` and friends and raises where the compiled library did
not load, because the operators do not exist. Declaring their schemas is enough: FAR uses torchvision's transforms and
datasets, never these operators.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

SCHEMAS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = None  # a torch.library.Library undeclares its operators when it is collected, so one reference stays here


def compiled_ops_load() -> bool:
    """Whether torchvision's own `_C` library loads beside this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    folder = Path(spec.origin).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def ensure_loadable() -> bool:
    """Declares the missing schemas; returns True where that was needed. Safe to call any number of times."""
    global _library
    if _library is not None:
        return True
    if compiled_ops_load() or hasattr(torch.ops.torchvision, SCHEMAS[0]):  # declared by others
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for name in SCHEMAS:
        _library.define(name + _SIGNATURE)
    return True
