"""Teachers, what replaces their attention, and how it is computed."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
