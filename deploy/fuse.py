"""A model for inference: one operator where the engine covers it, else merged block by block."""

import copy
import logging
from collections.abc import Collection

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deploy import packed
from models.features import kl_divergence
from models.merged import refuse_loading
from models.replace import replacements
from utils.errors import FarError

log = logging.getLogger(__name__)


def merge_blocks(model: VisionTransformer) -> VisionTransformer:
    """A frozen copy of the model in eval mode, each replacement in its merged form, on any device, by any kernel."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replaced = replacements(model)
    for index, attn in replaced.items():
        model.blocks[index].attn = attn.merged()
    if any(model.blocks[index].attn is not attn for index, attn in replaced.items()):
        model.register_load_state_dict_pre_hook(refuse_loading)  # before its other parts are written
    return model


@torch.no_grad()
def tell_what_int8_loses(model: VisionTransformer, keep: Collection[str], images: Tensor) -> None:
    """Logs a line where int8 keeps less than 99 % of float32's answers, with the product that is most to blame."""

    def compare(keep: Collection[str]) -> tuple[float, float]:
        logits = packed.PackedModel(model, torch.int8, keep)(images)
        agreement = (logits.argmax(1) == expected.argmax(1)).double().mean()
        return agreement.item(), kl_divergence(logits, expected).item()

    expected = packed.PackedModel(model)(images)
    agreement, divergence = compare(keep)
    if not agreement >= 0.99:  # NaN, too
        others = {product: compare({*keep, product}) for product in packed.PRODUCTS if product not in keep}
        said = f"int8 keeps {agreement:.1%} of the answers on {len(images)} images, KL {divergence:.2g}"
        if others:
            best = min(others, key=lambda product: others[product][1])
            said += f"; with keep={{{best!r}}}, in float32: {others[best][0]:.1%}, KL {others[best][1]:.2g}"
        log.warning(said)


def fuse(
    model: VisionTransformer,
    precision: torch.dtype | str = torch.float32,
    keep: Collection[str] = (),
    images: Tensor | None = None,
) -> nn.Module:
    """The function of a FAR model or a teacher without gradients, images (B, 3, S, S) to logits (B, classes).

    One operator (`deploy.packed`) where that covers the model; else, said in one log line, merged block by block. The
    model itself stays as it is.

    Args:
        precision: of weights and activations in matrix products, float32, bfloat16 or int8. FarError where the operator
            does not serve.
        keep: of `packed.PRODUCTS`, what stays float32 in int8.
        images: (B, 3, S, S), on which int8 is compared with float32; a line is logged where it falls short.
    """
    precision, keep = packed.PRECISIONS.get(precision, precision), frozenset([keep] if isinstance(keep, str) else keep)
    reason = packed.why_not(model, precision)
    if not reason:
        if images is not None and precision == torch.int8:
            tell_what_int8_loses(model, keep, images)
        return packed.PackedModel(model, precision, keep)
    if precision != torch.float32:
        raise FarError(f"--fuse {str(precision).removeprefix('torch.')}: {reason}; use --fuse float32")
    if not isinstance(model, VisionTransformer):
        raise FarError(f"fuse: {reason}; give it the model alone")
    log.warning("fused block by block, not as one operator: %s", reason)
    return merge_blocks(model)
