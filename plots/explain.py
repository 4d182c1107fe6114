"""What a model looks at: measures that serve attention and LSTM alike, and attention's own for comparison.

All maps are over tokens, class token first. Models are put in eval mode by the caller.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.features import keeping_z, take_z


def integrated_gradients(model: VisionTransformer, images: Tensor, classes: Tensor, steps: int = 32) -> Tensor:
    """Integrated gradients of the logits of `classes`, summed over colour channels.

    Sundararajan et al., arXiv 1703.01365: image minus baseline, times the mean gradient over the midpoints of `steps`
    equal parts of the straight line from the baseline to the image. The baseline is the image's mean colour, which
    shows no shape: a blurred copy often keeps the class, which leaves little of the logit to explain, and a black one
    gives black parts of the image no importance.

    images (B, 3, S, S), classes (B,). Returns (B, S, S). Signed: positive raises the logit. A map sums to the logit of
    the image minus the logit of its baseline, up to the error of the midpoint rule.
    """
    baseline = images.mean((2, 3), keepdim=True)
    gradient = torch.zeros_like(images)
    for step in range(steps):
        point = (baseline + (step + 0.5) / steps * (images - baseline)).requires_grad_()
        with torch.enable_grad():
            logits = model(point).gather(1, classes[:, None])
            gradient += torch.autograd.grad(logits.sum(), point)[0] / steps
    return ((images - baseline) * gradient).sum(1)


def token_similarity(z: Tensor) -> Tensor:
    """Cosine between every two tokens of z (B, N, D): (B, N, N)."""
    z = F.normalize(z.float(), dim=2)
    return z @ z.transpose(1, 2)


def z_of(attn: nn.Module, x: Tensor) -> Tensor:
    """z (B, N, D) of attention or replacement: what enters its output projection."""
    with keeping_z([attn]):
        attn(x)
        return take_z(attn)


def influence(
    attn: nn.Module,
    x: Tensor,
    tokens: Sequence[int] | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """||d z_i / d x_j||, the Frobenius norm of how output token i depends on input token j.

    Args:
        x: one image's tokens (N, D).
        tokens: the output tokens i looked at; all by default.
        probes: Gaussian directions per output token, an unbiased estimate of the square; None takes all D, exactly.

    Returns (len(tokens), N), row i the output, column j the input.
    """
    n, dim = x.shape
    count = probes or dim
    rows = []
    with torch.enable_grad():
        copies = x.detach().expand(count, n, dim).clone().requires_grad_()
        z = z_of(attn, copies)  # (count, N, D)
        for i in range(n) if tokens is None else tokens:
            if probes:
                directions = torch.randn(count, dim, generator=generator).to(x) / probes**0.5
            else:
                directions = torch.eye(dim, device=x.device, dtype=x.dtype)
            (gradient,) = torch.autograd.grad(z[:, i], copies, directions, retain_graph=True)
            rows.append(gradient.square().sum((0, 2)).sqrt())
    return torch.stack(rows)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rho of two maps of the same size (ties broken by place)."""
    ranks = [t.flatten().argsort(stable=True).argsort(stable=True).double() for t in (a, b)]
    a, b = (r - r.mean() for r in ranks)
    return ((a @ b) / (a.norm() * b.norm())).item()
