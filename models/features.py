"""What a forward pass leaves behind: the inputs, z and outputs of a model's blocks."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def kl_divergence(student: Tensor, teacher: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(teacher || student) in nats of logits (B, classes), the mean over B or "sum": 0 is the same probabilities."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction=reduction, log_target=True)


class Features(NamedTuple):
    """What a forward pass leaves behind. Maps are (B, N, D), by block index."""

    logits: Tensor | None
    inputs: dict[int, Tensor]
    z: dict[int, Tensor]  # joined head outputs before the output projection
    output: dict[int, Tensor]


def _keep_z(proj: nn.Module, args: tuple[Tensor]) -> None:
    proj.z = args[0]


@contextlib.contextmanager
def keeping_z(attns: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, attentions and replacements store z, their output projection's input, for `take_z`. May be nested."""
    new = [attn.proj for attn in attns if _keep_z not in attn.proj._forward_pre_hooks.values()]
    handles = [proj.register_forward_pre_hook(_keep_z) for proj in new]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def take_z(attn: nn.Module) -> Tensor | None:
    """The z of the last call, which is forgotten; None without one."""
    return vars(attn.proj).pop("z", None)


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters the first block, (B, N, D)."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def forward_features(model: VisionTransformer, images: Tensor, blocks: Iterable[int], answers: bool = True) -> Features:
    """A forward pass, keeping inputs, z and outputs of the named blocks.

    Without `answers` it ends with the last of them, and there are no logits.
    """
    blocks = set(blocks)
    seen = Features(None, {}, {}, {})
    depth = len(model.blocks) if answers else 1 + max(blocks, default=-1)
    with keeping_z(model.blocks[i].attn for i in blocks):
        x = embed(model, images)
        for i, block in enumerate(islice(model.blocks, depth)):
            before, x = x, block(x)
            z = take_z(block.attn)  # compiled ones all leave it
            if i in blocks:
                seen.inputs[i], seen.z[i], seen.output[i] = before, z, x
    return seen._replace(logits=model.forward_head(model.norm(x))) if answers else seen


def forward_blocks(model: VisionTransformer, inputs: dict[int, Tensor]) -> Features:
    """Each block on an input of its own, independent of the others."""
    with keeping_z(model.blocks[i].attn for i in inputs):
        output = {i: model.blocks[i](x) for i, x in inputs.items()}
        return Features(None, inputs, {i: take_z(model.blocks[i].attn) for i in inputs}, output)


def attention_inputs(model: VisionTransformer, images: Tensor, blocks: Iterable[int]) -> dict[int, Tensor]:
    """What enters each block's attention (or its replacement): norm1 of the running state, (B, N, D)."""
    with torch.no_grad():
        seen = forward_features(model, images, blocks)
        return {i: model.blocks[i].norm1(x) for i, x in seen.inputs.items()}


def attention_weights(attn: nn.Module, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of timm's attention on x (B, N, D): (B, H, N, N), rows summing to 1."""
    b, n, _ = x.shape
    q, k, _ = attn.qkv(x).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    return (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(-1)
