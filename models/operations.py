"""What a model computes for one image, operation by operation: exact counts that no hardware enters."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models import kernels
from utils.errors import FarError


class Operation(NamedTuple):
    """Matrix products side by side, then elementwise work on what they give.

    vectors: vectors that each matrix is multiplied with; elementwise work alone has no matrices.
    matrices: (inputs, outputs) of each.
    stored: the matrices are weights; else activations, as attention's keys and values are.
    written: values of activations that become its matrices.
    waits: what a vector's turn waits for: its own "token", "all" tokens, or the result of the "previous" one.
    added: how many of every so many outputs, (added, outputs), do nothing but add to those of the operation before.
    elementwise: additions, multiplications and comparisons.
    functions: exponentials, tanh, sigmoid, erf, reciprocals and square roots.
    operands: values read besides the inputs of products.
    writes: values written.

    Every operation reads what it needs once and writes its results once; each matrix reads its own inputs. What is
    elementwise behind a product happens before its results are written.
    """

    name: str
    vectors: int
    matrices: tuple[tuple[int, int], ...] = ()
    stored: bool = True
    written: int = 0
    waits: str = "token"
    added: tuple[int, int] = (0, 1)
    elementwise: int = 0
    functions: int = 0
    operands: int = 0
    writes: int = 0

    @property
    def cells(self) -> int:
        """Values in its matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def macs(self) -> int:
        return self.vectors * self.cells

    @property
    def reads(self) -> int:
        inputs = self.vectors * sum(inputs for inputs, _ in self.matrices)
        return inputs + self.operands + self.written

    @property
    def chain(self) -> int:
        """Products of which each needs the one before."""
        return (self.vectors if self.waits == "previous" else 1) if self.matrices else 0


class Counts(NamedTuple):
    """Sums over operations, for one image."""

    static_macs: int  # with stored weights
    dynamic_macs: int  # between activations
    elementwise: int
    functions: int
    reads: int
    writes: int
    chain: int  # the longest chain of dependent products
    weights: int  # in stored matrices


def count(operations: Iterable[Operation]) -> Counts:
    ops = list(operations)
    return Counts(
        static_macs=sum(op.macs for op in ops if op.stored),
        dynamic_macs=sum(op.macs for op in ops if not op.stored),
        elementwise=sum(op.elementwise for op in ops),
        functions=sum(op.functions for op in ops),
        reads=sum(op.reads for op in ops),
        writes=sum(op.writes for op in ops),
        chain=sum(op.chain for op in ops),
        weights=sum(op.cells for op in ops if op.stored),
    )


def linear(name: str, layer: nn.Linear, vectors: int, elementwise: int = 0, **more) -> Operation:
    outputs, inputs = layer.weight.shape
    elementwise += 0 if layer.bias is None else vectors * outputs
    return Operation(name, vectors, ((inputs, outputs),), elementwise=elementwise, writes=vectors * outputs, **more)


def side_by_side(name: str, weights: Iterable[Tensor], vectors: int, elementwise: int) -> Operation:
    """Products of several weights (outputs, inputs) and the same number of vectors each."""
    matrices = tuple((w.shape[1], w.shape[0]) for w in weights)
    return Operation(name, vectors, matrices, elementwise=elementwise, writes=vectors * sum(w[1] for w in matrices))


def recurrence(kind: kernels.CellKind, cells: Iterable[kernels.AnyCell], tokens: int) -> list[Operation]:
    """Of recurrent cells: products with W_ih wait for nothing, those with W_hh for the token before."""
    cells = list(cells)
    units = tokens * sum(cell.units for cell in cells)
    gates, states = kind.gates * units, kind.states * units
    recurrent = [cell.weight_hh for cell in cells if hasattr(cell, "weight_hh")]
    hidden = side_by_side("weight_hh", recurrent, tokens, kind.elementwise * units)
    read = gates + states - (units if recurrent else 0)  # the product has read the hidden state
    hidden = hidden._replace(waits="previous", functions=kind.functions * units, operands=read, writes=states)
    hidden = hidden._replace(added=(kind.added, kind.gates))
    return [side_by_side("weight_ih", [cell.weight_ih for cell in cells], tokens, gates), hidden]


def gelu(values: int) -> dict[str, int]:
    """x / 2 (1 + erf(x / sqrt 2))."""
    return {"elementwise": 4 * values, "functions": values}


def _norm(name: str, norm: nn.Module, vectors: int, dim: int) -> Iterator[Operation]:
    """LayerNorm: mean, difference, square, its sum, scale, weight, bias; one inverse root a token."""
    if not isinstance(norm, nn.Identity):
        values = vectors * dim
        yield Operation(name, vectors, elementwise=7 * values, functions=vectors, operands=values, writes=values)


def _residual(name: str, scale: nn.Module, vectors: int, dim: int) -> Operation:
    """x + branch, with DINOv2's factor a channel (LayerScale) where there is one."""
    values = vectors * dim
    scaled = 0 if isinstance(scale, nn.Identity) else values
    return Operation(name, vectors, elementwise=values + scaled, operands=2 * values, writes=values)


def _attention(attn: Attention, tokens: int) -> Iterator[Operation]:
    """Softmax: scale of the queries; maximum, difference, exponential, sum, one reciprocal a row, product."""
    dim, heads, width = attn.num_heads * attn.head_dim, attn.num_heads, attn.head_dim
    scores = heads * tokens**2
    yield linear("qkv", attn.qkv, tokens)
    for name, norm in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm)):
        yield from _norm(name, norm, tokens * heads, width)
    yield Operation(
        "scores",
        tokens,
        ((width, tokens),) * heads,
        stored=False,
        written=tokens * dim,
        waits="all",
        elementwise=tokens * dim + 4 * scores,
        functions=scores + heads * tokens,
        writes=scores,
    )
    yield Operation(
        "values", tokens, ((tokens, width),) * heads, stored=False, written=tokens * dim, writes=tokens * dim
    )
    yield linear("proj", attn.proj, tokens)


def operations(model: VisionTransformer) -> Iterator[Operation]:
    """Of a teacher or a FAR model, in their order; every token goes through every block.

    An MLP's activation counts as the exact GELU. Raises FarError where a part's operations are not known.
    """
    if getattr(model, "attn_pool", None) is not None:
        raise FarError("it pools tokens by attention, whose operations are not known")
    embed, dim = model.patch_embed, model.embed_dim
    tokens = embed.num_patches + model.num_prefix_tokens
    outputs, *patch = embed.proj.weight.shape
    inputs = patch[0] * patch[1] * patch[2]
    positions = embed.num_patches * outputs  # an addition each; of the prefix tokens they are stored added
    biases = 0 if embed.proj.bias is None else positions
    yield Operation(
        "patch_embed",
        embed.num_patches,
        ((inputs, outputs),),
        elementwise=biases + positions,
        operands=positions,
        writes=tokens * dim,
    )
    yield from _norm("norm_pre", model.norm_pre, tokens, dim)
    for i, block in enumerate(model.blocks):
        for part in (block.attn, block.mlp):
            if not (hasattr(part, "operations") or isinstance(part, Attention)):
                raise FarError(f"its block {i} has a {type(part).__name__}, whose operations are not known")
        mixing = _attention(block.attn, tokens) if isinstance(block.attn, Attention) else block.attn.operations(tokens)
        for name, norm, part, scale in (
            ("1", block.norm1, mixing, block.ls1),
            ("2", block.norm2, block.mlp.operations(tokens), block.ls2),
        ):
            branch = (*_norm(f"norm{name}", norm, tokens, dim), *part, _residual(f"residual{name}", scale, tokens, dim))
            yield from (op._replace(name=f"blocks.{i}.{op.name}") for op in branch)
    yield from _norm("norm", model.norm, tokens, dim)
    if model.global_pool != "token":
        values = embed.num_patches * dim
        yield Operation("pool", 1, waits="all", elementwise=values, operands=values, writes=dim)
    yield from _norm("fc_norm", model.fc_norm, 1, dim)
    heads = model.get_classifier()
    heads = [head for head in (heads if isinstance(heads, tuple) else (heads,)) if isinstance(head, nn.Linear)]
    if heads:  # a distilled DeiT has two, and means their logits
        classes = len(heads[0].weight)
        yield side_by_side("head", [head.weight for head in heads], 1, len(heads) * classes)._replace(
            elementwise=len(heads) * classes + (len(heads) > 1) * 2 * classes, writes=classes
        )
