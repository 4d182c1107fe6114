"""--compile: the blocks of teacher and student through torch.compile, while a stage trains."""

import contextlib
from collections.abc import Iterator

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.features import keeping_z, take_z
from utils.errors import FarError, first_line

COMPILER = "inductor"
VARIANTS = 8  # of one block: training and evaluation, whole batches and an epoch's last, gradients or none


def check_compiler(device: torch.device) -> None:
    """Raises FarError where torch cannot compile for the device."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=COMPILER)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001  (a compiler, a driver, a disk: each fails in its own way)
        raise FarError(
            f"--compile: torch cannot compile here ({first_line(error):.200}); leave it out, or install a C++ compiler"
        ) from error


def _drop_z(model: VisionTransformer, *_) -> None:
    """A hook behind a call of the whole model, an evaluation, which does not read z."""
    for block in model.blocks:
        take_z(block.attn)


@contextlib.contextmanager
def compiled(task: nn.Module) -> Iterator[None]:
    """While open, all blocks of the task's models are compiled, one by one, so that those alike share their code.

    The models themselves stay as they are: their checkpoints, their copies.
    """
    models = [module for module in task.modules() if isinstance(module, VisionTransformer)]
    blocks = [block for model in models for block in model.blocks]
    with contextlib.ExitStack() as stack:
        # Blocks differ in their rate of stochastic depth, and each number is compiled in.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS * len(blocks)))
        # Compiled code is shared without a look at hooks: either all blocks have one, or none.
        for model in models:
            stack.enter_context(keeping_z(block.attn for block in model.blocks))
            stack.callback(model.register_forward_hook(_drop_z).remove)
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=COMPILER)
            stack.callback(delattr, block, "forward")
        yield
