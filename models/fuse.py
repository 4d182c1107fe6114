"""A model for inference: one operator where the engine covers it, else merged block by block."""

import copy
import logging

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import whole
from models.merged import refuse_loading
from models.replace import replacements
from utils.errors import FarError

log = logging.getLogger(__name__)


class LastBlock(nn.Module):
    """The last block of a classifier that reads the class token alone: once tokens are mixed, only that one goes on.

    x (B, N, D) to (B, 1, D).
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2

    def forward(self, x: Tensor, **_) -> Tensor:
        x = x[:, :1] + self.ls1(self.attn(self.norm1(x))[:, :1])
        return x + self.ls2(self.mlp(self.norm2(x)))


def merge_blocks(model: VisionTransformer) -> VisionTransformer:
    """A frozen copy of the model in eval mode, each replacement in its merged form, on any device, by any kernel.

    Where the last block is replaced, `forward_features` gives the class token alone, (B, 1, D).
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    last = len(model.blocks) - 1 if model.global_pool == "token" else None
    found = replacements(model)
    for index, attn in found.items():
        model.blocks[index].attn = attn.merged(1 if index == last else None)
    if any(model.blocks[index].attn is not attn for index, attn in found.items()):
        model.register_load_state_dict_pre_hook(refuse_loading)  # before its other parts are written
    if last in found:
        model.blocks[last] = LastBlock(model.blocks[last])
    return model


def fuse(model: VisionTransformer, precision: torch.dtype = torch.float32) -> nn.Module:
    """The function of a FAR model or a teacher without gradients, images (B, 3, S, S) to logits (B, classes).

    One operator (`models.whole`) where that covers the model; else, said in one log line, merged block by block. The
    model itself stays as it is. precision: of weights and activations in matrix products, float32 or bfloat16 (FarError
    where the operator does not serve).
    """
    reason = whole.why_not(model, precision)
    if not reason:
        return whole.WholeModel(model, precision)
    if precision != torch.float32:
        raise FarError(f"--fuse bfloat16: {reason}; use --fuse float32")
    log.warning("fused block by block, not as one operator: %s", reason)
    return merge_blocks(model)
