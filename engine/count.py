"""What a model costs: parameters, multiply-accumulates, bytes."""

import io

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.bilstm import MultiHeadBiLSTM
from models.fuse import FusedBiLSTM
from models.replace import FarConfig, count_parameters, pack


def _linear(module: nn.Linear, args, output) -> int:
    return output.numel() * module.in_features


def _conv(module: nn.Conv2d, args, output) -> int:
    return output.numel() * module.weight[0].numel()


def _attention(module: Attention, args, output) -> int:
    b, n, dim = args[0].shape
    return 2 * b * n * n * dim  # queries by keys, weights by values; its projections are Linear


def _lstm(module: MultiHeadBiLSTM, args, output) -> int:
    b, n, _ = args[0].shape
    return b * n * sum(r.weight_ih.numel() + r.weight_hh.numel() for head in module.lstm for r in head)


def _torch_lstm(module: nn.LSTM, args, output) -> int:
    b, n, _ = args[0].shape  # batch first
    return b * n * sum(w.numel() for w in module.parameters() if w.dim() == 2)


def _fused(module: FusedBiLSTM, args, output) -> int:
    b, n, _ = args[0].shape
    mixing = module.pre_w.numel() + sum(4 * u * (module.depth + u) for u in module.units)
    return b * n * mixing + output[..., 0].numel() * module.out_w.numel()


COUNTERS = {
    FusedBiLSTM: _fused,
    nn.LSTM: _torch_lstm,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    Attention: _attention,
    MultiHeadBiLSTM: _lstm,
}


@torch.no_grad()
def count_macs(model: VisionTransformer) -> int:
    """Multiply-accumulates of all matrix products for one image, counted by hooks in a forward pass.

    An LSTM's are 4 u (d + u) a token, head and direction; gate activations and other elementwise work are not counted.
    """
    total, handles = [], []
    for module in model.modules():
        for kind, counter in COUNTERS.items():
            if isinstance(module, kind):
                handles.append(
                    module.register_forward_hook(lambda m, a, out, counter=counter: total.append(counter(m, a, out)))
                )
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
    """Parameters, MACs an image, checkpoint bytes, and LSTM hidden units."""
    buffer = io.BytesIO()
    torch.save(pack(model, config), buffer)
    units = sum(d.units for m in model.modules() if isinstance(m, MultiHeadBiLSTM) for head in m.lstm for d in head)
    return {"parameters": count_parameters(model), "macs": count_macs(model), "bytes": buffer.tell(), "units": units}
