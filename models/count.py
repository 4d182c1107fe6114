"""What a model costs: parameters, multiply-accumulates, bytes."""

import io

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.replace import FarConfig, count_parameters, pack, replacements


@torch.no_grad()
def count_macs(model: VisionTransformer) -> int:
    """Multiply-accumulates of all matrix products for one image, counted by hooks in a forward pass.

    Activations and other elementwise work are not counted.
    """
    total, handles = 0, []

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, Attention):  # queries by keys, weights by values; its projections are Linear
            _, n, dim = args[0].shape
            total += 2 * n * n * dim
        else:
            total += sum(operation.macs for operation in module.operations(args[0].shape[1]))

    def watch(module: nn.Module) -> None:
        answers = hasattr(module, "operations")  # for its children too
        if answers or isinstance(module, (nn.Linear, nn.Conv2d, Attention)):
            handles.append(module.register_forward_hook(add))
        if not answers:
            for child in module.children():
                watch(child)

    watch(model)
    training, weight = model.training, model.patch_embed.proj.weight
    try:
        model.eval()(weight.new_zeros(1, weight.shape[1], *model.patch_embed.img_size))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total


def count_all(model: VisionTransformer, config: FarConfig) -> dict[str, int]:
    """Parameters, MACs an image, checkpoint bytes, and the hidden units of what replaces attention."""
    buffer = io.BytesIO()
    torch.save(pack(model, config), buffer)
    units = sum(int(torch.tensor(attn.sizes).sum()) for attn in replacements(model).values())
    return {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": buffer.tell(), "units": units}
