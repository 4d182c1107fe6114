"""torch.hub: `torch.hub.load(PATH, "far", source="local", checkpoint=FILE)`, from any folder.

The suite's packages have names that others have too (utils, models, datasets, engine). Here they are imported under a
name of their own, `far_hub.models` and so on: sys.path and whatever else is called utils stay as they are, before and
after, imports inside functions and pickling go on working, and nothing of the user's is taken for ours.
"""

import ast as _ast
import importlib as _importlib
import importlib.machinery as _machinery
import sys as _sys
import types as _types
from pathlib import Path as _Path

dependencies = ["torch", "torchvision", "timm", "numpy", "safetensors"]
_NAME = "far_hub"
_ROOT = str(_Path(__file__).resolve().parent)
_OURS = {"models", "utils", "datasets", "engine", "deploy", "plots"}


class _Renamed(_ast.NodeTransformer):
    """`from models import x` becomes `from far_hub.models import x`: the form in which the suite imports itself."""

    def visit_ImportFrom(self, node: _ast.ImportFrom) -> _ast.ImportFrom:
        if not node.level and node.module.partition(".")[0] in _OURS:
            node.module = f"{_NAME}.{node.module}"
        return node


class _Loader(_machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> _types.CodeType:
        """Compiled anew: the cache beside the file is of the file as it is."""
        tree = _Renamed().visit(_ast.parse(self.get_data(self.path), self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> _machinery.ModuleSpec | None:
        if not name.startswith(f"{_NAME}."):
            return None
        return _machinery.FileFinder(path[0], (_Loader, [".py"])).find_spec(name)


def _suite(module: str) -> _types.ModuleType:
    """A module of the suite under its name here."""
    package = _sys.modules.get(_NAME)
    if package is None:
        package = _sys.modules[_NAME] = _types.ModuleType(_NAME, __doc__)
        package.__path__ = [_ROOT]
        _sys.meta_path.insert(0, _Finder)
    if package.__path__ != [_ROOT]:
        raise RuntimeError(
            f"far: this process has loaded another copy of the suite, {package.__path__[0]}; use that one"
        )
    return _importlib.import_module(f"{_NAME}.{module}")


def far(checkpoint, input_size=None, num_classes=None, drop_path=0.0):
    """The model of a FAR checkpoint in eval mode, a timm VisionTransformer with its configuration of the data.

    checkpoint: a file of this suite. input_size: image side in pixels, positions resized. num_classes: with a fresh
    classifier where it differs. drop_path: stochastic depth, for training.
    """
    return _suite("models.hub").load(checkpoint, input_size, num_classes, drop_path)
