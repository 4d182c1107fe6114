"""Group norms of hidden units, and the DeepHoyer regularizers over them (Yang et al., arXiv 1908.09979, group form).

A group is every weight that dies with a hidden unit. Norms are kept by place: (block, head, direction) for an LSTM's
units, (block,) for an MLP's; each place holds a vector of its units' norms.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.bilstm import DirectionLSTM, MultiHeadBiLSTM

Place = tuple[int, ...]
Norms = dict[Place, Tensor]


def _root(squares: Tensor) -> Tensor:
    """Square roots whose gradient at an exact zero is zero instead of infinite."""
    positive = squares > 0
    return torch.where(positive, squares, torch.ones_like(squares)).sqrt() * positive


def lstm_unit_norms(direction: DirectionLSTM, readout: Tensor) -> Tensor:
    """s_j of one head and direction: 4 gate rows of W_ih, W_hh and biases, the columns of W_hh and of head_proj.

    Args:
        direction: u units reading d channels.
        readout: their columns of head_proj's weight, (d, u).

    Returns (u,). An entry of W_hh that joins a unit with itself lies in its row and its column, and counts once.
    """
    gates = lambda w: w.unflatten(0, (4, direction.units)).square()  # noqa: E731  (4, u, ...)
    recurrent = gates(direction.weight_hh)  # (4, to, from)
    own = recurrent.diagonal(dim1=1, dim2=2).sum(0)
    biases = gates(direction.bias_ih) + gates(direction.bias_hh)
    squares = gates(direction.weight_ih).sum((0, 2)) + biases.sum(0) + readout.square().sum(0)
    return _root(squares + recurrent.sum((0, 2)) + recurrent.sum((0, 1)) - own)


def mlp_unit_norms(mlp: nn.Module) -> Tensor:
    """s_j of an MLP's hidden units: fc1's row and bias, fc2's column. Returns (hidden,)."""
    return _root(mlp.fc1.weight.square().sum(1) + mlp.fc1.bias.square() + mlp.fc2.weight.square().sum(0))


def lstm_norms(model: VisionTransformer) -> Norms:
    """Norms of every hidden unit of the replaced blocks, by (block, head, direction)."""
    norms: Norms = {}
    for i, block in enumerate(model.blocks):
        if isinstance(block.attn, MultiHeadBiLSTM):
            for h, (pair, proj) in enumerate(zip(block.attn.lstm, block.attn.head_proj, strict=True)):
                columns = proj.weight.split([direction.units for direction in pair], dim=1)
                for r, direction in enumerate(pair):
                    norms[i, h, r] = lstm_unit_norms(direction, columns[r])
    return norms


def mlp_norms(model: VisionTransformer) -> Norms:
    """Norms of every MLP's hidden units, by (block,)."""
    return {(i,): mlp_unit_norms(block.mlp) for i, block in enumerate(model.blocks)}


def by_block(norms: Norms) -> dict[int, Tensor]:
    """The norms of a block in one vector."""
    blocks: dict[int, list[Tensor]] = {}
    for (block, *_), s in norms.items():
        blocks.setdefault(block, []).append(s)
    return {block: torch.cat(parts) for block, parts in blocks.items()}


def group_l1(s: Tensor) -> Tensor:
    return s.sum()


def group_hoyer(s: Tensor) -> Tensor:
    """sum s / sqrt(sum s^2): scale-free, between 1 and sqrt(groups)."""
    return s.sum() / _root(s.square().sum()).clamp_min(torch.finfo(s.dtype).tiny)


def group_hoyer_square(s: Tensor) -> Tensor:
    """(sum s)^2 / sum s^2: scale-free, between 1 and the number of groups."""
    return s.sum().square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)


REGULARIZERS: dict[int, Callable[[Tensor], Tensor] | None] = {
    0: None,
    1: group_l1,
    2: group_hoyer,
    3: group_hoyer_square,
}


def penalty(norms: Norms, regularizer: Callable[[Tensor], Tensor]) -> Tensor:
    """The regularizer of each block, summed."""
    return torch.stack([regularizer(s) for s in by_block(norms).values()]).sum()


class Regularized(nn.Module):
    """A task whose loss gains `decay` times the penalty on the student's units.

    Args:
        task: forward(images, targets) to (loss, parts).
        model: the student inside it.
        kind: a key of REGULARIZERS.
        mlp: whether the MLPs' hidden units are regularized too.
        sensitivity: a unit below this share of its block's mean norm counts as sparse, for the curves only.

    forward returns (loss, parts), parts with `hoyer_square` and `sparsity` (0 to 1) of the LSTM's units besides.
    """

    def __init__(
        self, task: nn.Module, model: VisionTransformer, kind: int, decay: float, mlp: bool, sensitivity: float
    ):
        super().__init__()
        self.task, self.model = task, model
        self.regularizer, self.decay, self.mlp, self.sensitivity = REGULARIZERS[kind], decay, mlp, sensitivity

    def forward(self, images: Tensor, targets: Tensor):
        loss, parts = self.task(images, targets)
        families = [norms for norms in (lstm_norms(self.model), mlp_norms(self.model) if self.mlp else {}) if norms]
        if self.regularizer is not None:
            loss = loss + self.decay * sum(penalty(norms, self.regularizer) for norms in families)
        with torch.no_grad():
            blocks = list(by_block(families[0]).values())
            sparse = torch.cat([s < self.sensitivity * s.mean() for s in blocks]).float().mean()
            square = torch.stack([group_hoyer_square(s) for s in blocks]).sum()
        return loss, {**parts, "hoyer_square": square, "sparsity": sparse}
