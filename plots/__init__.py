"""Figures and pages: curves, fidelity, units, importance maps, what tokens a block mixes."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
