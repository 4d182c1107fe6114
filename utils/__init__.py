"""Helpers that know nothing of models or engines. Imported first by every script, so that torchvision always loads."""

from utils import torchvision_ops

torchvision_ops.ensure_loadable()
