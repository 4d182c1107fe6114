"""What a model costs: parameters, multiply-accumulates, bytes."""

import io
from collections.abc import Callable, Iterator

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.merged import MergedBiRNN
from models.parts import count_sizes
from models.replace import FarConfig, count_parameters, pack, replacements


def _linear(module: nn.Linear, args, output) -> int:
    return output.numel() * module.in_features


def _conv(module: nn.Conv2d, args, output) -> int:
    return output.numel() * module.weight[0].numel()


def _attention(module: Attention, args, output) -> int:
    b, n, dim = args[0].shape
    return 2 * b * n * n * dim  # queries by keys, weights by values; its projections are Linear


def _merged(module: MergedBiRNN, args, output) -> int:
    b, n, _ = args[0].shape
    return b * sum(operation.macs for operation in module.operations(n, output.shape[1]))


OTHERS = {nn.Linear: _linear, nn.Conv2d: _conv, Attention: _attention, MergedBiRNN: _merged}


def counters(module: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """The outermost modules that answer for their MACs (`BlockPart.macs`), and others around them."""
    if answer := getattr(module, "macs", None):
        yield module, lambda _, args, output: answer(args[0].shape)
        return
    yield from ((module, counter) for kind, counter in OTHERS.items() if isinstance(module, kind))
    for child in module.children():
        yield from counters(child)


@torch.no_grad()
def count_macs(model: VisionTransformer) -> int:
    """Multiply-accumulates of all matrix products for one image, counted by hooks in a forward pass.

    Activations and other elementwise work are not counted.
    """
    total: list[int] = []
    handles = [
        module.register_forward_hook(lambda m, args, out, counter=counter: total.append(counter(m, args, out)))
        for module, counter in counters(model)
    ]
    training, weight = model.training, model.patch_embed.proj.weight
    try:
        model.eval()(
            torch.zeros(1, weight.shape[1], *model.patch_embed.img_size, dtype=weight.dtype, device=weight.device)
        )
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sum(total)


def count_all(model: VisionTransformer, config: FarConfig) -> dict[str, int]:
    """Parameters, MACs an image, checkpoint bytes, and the hidden units of what replaces attention."""
    buffer = io.BytesIO()
    torch.save(pack(model, config), buffer)
    units = sum(count_sizes(attn.sizes) for attn in replacements(model).values())
    return {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": buffer.tell(), "units": units}
