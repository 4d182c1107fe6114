"""Lets torchvision be imported beside a torch its compiled operators were not built for (a CPU-only torch, say).

`import torchvision` registers fake kernels for `torchvision::nms` and friends and raises where the compiled library did
not load, because the operators do not exist. Declaring their schemas is enough: FAR uses torchvision's transforms and
datasets, never these operators.
"""

import importlib.util
from pathlib import Path

import torch

_library = None  # a torch.library.Library undeclares its operators when it is collected, so one reference stays here


def compiled_ops_load() -> bool:
    """Whether torchvision's own `_C` library loads beside this torch."""
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        torch.ops.load_library(str(next(folder.glob("_C.*"))))
    except (OSError, StopIteration):
        return False
    return True


def ensure_loadable() -> bool:
    """Declares the missing schemas; returns True where that was needed. Safe to call any number of times."""
    global _library
    declared = hasattr(torch.ops.torchvision, "nms")  # by others
    if _library is None and not declared and not compiled_ops_load():
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _library is not None
