"""Training, pruning, measuring and explaining."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
