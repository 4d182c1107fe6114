"""torch.hub: `torch.hub.load(PATH, "far", source="local", checkpoint=FILE)`, from any folder."""

import sys as _sys
from pathlib import Path as _Path

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]

# torch.hub puts this folder first on sys.path, but a package of the same name that is already imported stays.
for _name in ("models", "utils"):
    _file = getattr(_sys.modules.get(_name), "__file__", None) or __file__
    if _Path(__file__).parent not in _Path(_file).parents:
        raise ImportError(f"far: another `{_name}` is already imported ({_file}); load the model in its own process")

from models import hub as _hub  # noqa: E402


def far(checkpoint, input_size=None, num_classes=None, drop_path=0.0):
    """The model of a FAR checkpoint in eval mode, a timm VisionTransformer with its configuration of the data.

    checkpoint: a file of this suite. input_size: image side in pixels, positions resized. num_classes: with a fresh
    classifier where it differs. drop_path: stochastic depth, for training.
    """
    return _hub.load(checkpoint, input_size, num_classes, drop_path)
