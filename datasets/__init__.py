"""Data sets, their transforms and loaders."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
