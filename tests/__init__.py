"""Tests. Without a GPU the Triton kernels are interpreted: said here, before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
