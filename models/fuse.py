"""A FAR model for inference."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.fused_birnn import refuse_loading
from models.replace import replacements


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


def fuse(model: VisionTransformer, recurrent: torch.dtype = torch.float32) -> VisionTransformer:
    """Gives every replacement of the model its fused form, in place, and freezes the model in eval mode.

    Its logits stay the same. Where the last block is replaced, `forward_features` gives the class token alone,
    (B, 1, D).
    """
    last = len(model.blocks) - 1 if model.global_pool == "token" else None
    for index, attn in (found := replacements(model)).items():
        tokens = 1 if index == last else None
        model.blocks[index].attn = attn.fused(recurrent == torch.bfloat16, tokens)
    if found:
        model.register_load_state_dict_pre_hook(refuse_loading)  # before its other parts are written
    if last in found:
        model.blocks[last] = LastBlock(model.blocks[last])
    return model.eval().requires_grad_(False)
