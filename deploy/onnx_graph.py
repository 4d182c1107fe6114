"""A FAR model or a plain DeiT as an ONNX graph of standard operators, built node by node, without an exporter.

Tokens are the first axis throughout, (N, B, D), as ONNX's LSTM reads them, so that no block transposes its input.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deploy.packed import structure_fault, without_scales
from models.kernels import Cell, CellKind
from models.merged import Merged
from models.mingru import MinGRUCell
from models.replace import replacements
from models.vit import prefix_positions
from utils.errors import FarError

OPSET = 20  # with GELU as one operator
OPSETS = (17, onnx.defs.onnx_opset_version())  # from 17 on there is LayerNormalization
# kind of cell: ONNX's name, ONNX's order of torch's gates, attributes
CELLS = {"lstm": ("LSTM", (0, 3, 1, 2), {}), "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1})}
SCANNED = "mingru"  # the kind of cell that ONNX does not have


class Graph:
    """Nodes and weights by name. A node's name is its (first) output's; every method returns it."""

    def __init__(self, opset: int):
        self.opset, self.nodes, self.weights = opset, [], {}

    def weight(self, name: str, value: Tensor) -> str:
        self.weights[name] = numpy_helper.from_array(value.detach().float().contiguous().numpy(), name)
        return name

    def shape(self, *sizes: int) -> str:
        """Integers that an operator takes as an input."""
        name = "sizes/" + ",".join(map(str, sizes))
        self.weights[name] = numpy_helper.from_array(np.array(sizes, np.int64), name)
        return name

    def node(self, op: str, name: str, *inputs: str, outputs: Sequence[str] = (), **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, list(outputs) or [name], name=name, **attributes))
        return name

    def linear(self, name: str, x: str, weight: Tensor, bias: Tensor | None) -> str:
        """weight (out, in)."""
        product = self.node("MatMul", name + "/product" * (bias is not None), x, self.weight(f"{name}/W", weight.t()))
        return product if bias is None else self.node("Add", name, product, self.weight(f"{name}/b", bias))

    def norm(self, name: str, x: str, norm: nn.LayerNorm) -> str:
        weights = self.weight(f"{name}/scale", norm.weight), self.weight(f"{name}/b", norm.bias)
        return self.node("LayerNormalization", name, x, *weights, axis=-1, epsilon=norm.eps)

    def gelu(self, name: str, x: str) -> str:
        """Exact; one operator from opset 20 on."""
        if self.opset >= 20:
            return self.node("Gelu", name, x)
        root, one, half = (self.weight(f"gelu/{v:.4g}", torch.tensor(v)) for v in (0.5**0.5, 1.0, 0.5))
        erf = self.node("Erf", f"{name}/erf", self.node("Mul", f"{name}/scaled", x, root))
        share = self.node("Mul", f"{name}/share", self.node("Add", f"{name}/shifted", erf, one), half)
        return self.node("Mul", name, x, share)

    def reshape(self, name: str, x: str, *sizes: int) -> str:
        """0 keeps a size, -1 is what is left."""
        return self.node("Reshape", name, x, self.shape(*sizes))

    def tokens(self, name: str, x: str, start: int, end: int) -> str:
        """Some tokens of (N, B, ...)."""
        return self.node("Slice", name, x, self.shape(start), self.shape(end), self.shape(0))

    def first(self, x: str) -> str:
        """The class token of (N, B, ...), (1, B, ...)."""
        return self.tokens(f"{x}/class-token", x, 0, 1)

    def split(self, name: str, x: str, sizes: Sequence[int]) -> list[str]:
        """(N, B, sum of sizes) along the last axis."""
        parts = [f"{name}{k}" for k in range(len(sizes))]
        self.node("Split", name, x, self.shape(*sizes), outputs=parts, axis=2)
        return parts

    def recurrent(self, name: str, x: str, kind: CellKind, cells: Sequence[Cell], way: str, last: bool = False) -> str:
        """Cells of one size, one a direction, on x (N, B, d): hidden states (N, directions, B, u), or the last ones."""
        op, order, attributes = CELLS[kind.name]

        def rows(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (kind.gates, -1))[list(order)].flatten(0, 1)

        w, r = (torch.stack([rows(cell[k]) for cell in cells]) for k in (0, 1))
        b = torch.stack([torch.cat([rows(cell.bias_ih), rows(cell.bias_hh)]) for cell in cells])
        weights = (self.weight(f"{name}/{key}", value) for key, value in (("W", w), ("R", r), ("B", b)))
        outputs = ("", name) if last else (name,)
        attributes = {**attributes, "direction": way, "hidden_size": cells[0].units}
        return self.node(op, name, x, *weights, outputs=outputs, **attributes)


class Piece(NamedTuple):
    """Hidden states, (N, directions, B, u) of one LSTM node or (N, B, u) of one cell.

    columns: for each direction, which of the block's units they are, (u,).
    """

    value: str
    columns: list[Tensor]


def _join(graph: Graph, name: str, pieces: Sequence[Piece], of_cells: bool) -> tuple[str, Tensor]:
    """Pieces as one (N, B, columns). of_cells: they are (N, B, u) already.

    Others of two directions are transposed once, together; those of one each, because OpenVINO 2026.4 joins LSTMs of
    one direction wrongly in batches otherwise.
    """
    values, columns = [], []
    for directions, title in ((2, f"{name}/both"), (1, f"{name}/single")):
        group = [piece for piece in pieces if len(piece.columns) == directions]
        columns += [piece.columns[r] for r in range(directions) for piece in group]
        states = [piece.value for piece in group]
        if of_cells:
            values += states
            continue
        if directions == 1:
            states = [graph.node("Transpose", f"{value}/tokens", value, perm=(0, 2, 1, 3)) for value in states]
        if len(states) > 1:
            states = [graph.node("Concat", f"{title}/units", *states, axis=3)]
        if directions == 2 and states:
            states = [graph.node("Transpose", f"{title}/tokens", *states, perm=(0, 2, 1, 3))]
        values += [graph.reshape(title, value, 0, 0, -1) for value in states]
    value = values[0] if len(values) == 1 else graph.node("Concat", f"{name}/hidden", *values, axis=2)
    return value, torch.cat(columns)


def _scan(graph: Graph, name: str, decay: str, added: str, tokens: int, reverse: bool) -> str:
    """`models.mingru.scan` of (N, B, u), for `reverse` from the last token to the first."""
    hop = 1
    while hop < tokens:
        title, left = f"{name}/hop{hop}", tokens - hop
        before, after, ends = ((hop, tokens), (0, left), left) if reverse else ((0, left), (hop, tokens), 0)
        if hop == 1:
            decay = graph.tokens(f"{title}/decay", decay, *after)
        else:  # over twice as many tokens
            halves = [graph.tokens(f"{title}/decay{k}", decay, k, k + left) for k in (0, hop // 2)]
            decay = graph.node("Mul", f"{title}/decay", *halves)
        carried = graph.node("Mul", f"{title}/carried", decay, graph.tokens(f"{title}/before", added, *before))
        moved = graph.node("Add", f"{title}/moved", graph.tokens(f"{title}/after", added, *after), carried)
        kept = graph.tokens(f"{title}/kept", added, ends, ends + hop)
        added = graph.node("Concat", title, *((moved, kept) if reverse else (kept, moved)), axis=0)
        hop *= 2
    return added


def _min_gru(
    graph: Graph, name: str, xs: Sequence[str], cells: Sequence[MinGRUCell], tokens: int, reverse: bool
) -> str:
    """All heads' hidden states in one direction, (N, B, sum u): head h's cell reads xs[h] (N, B, d).

    ONNX has no such cell: its recurrence is a scan of elementwise operators.
    """
    gates = []
    for k, gate in enumerate(("z", "n")):
        title, weights = f"{name}/{gate}", [cell.weight_ih.chunk(2)[k] for cell in cells]
        products = [graph.linear(f"{title}/head{h}", xs[h], w, None) for h, w in enumerate(weights)]
        joined = graph.node("Concat", f"{title}/heads", *products, axis=2)
        bias = graph.weight(f"{title}/b", torch.cat([cell.bias_ih.chunk(2)[k] for cell in cells]))
        gates.append(graph.node("Add", title, joined, bias))
    share = graph.node("Sigmoid", f"{name}/share", gates[0])
    added = graph.node("Mul", f"{name}/added", share, gates[1])
    if tokens == 1:
        return added
    decay = graph.node("Sub", f"{name}/decay", graph.weight("one", torch.tensor(1.0)), share)
    return _scan(graph, name, decay, added, tokens, reverse)


def _recurrence(graph: Graph, name: str, maps: Merged, x: str, last: bool, tokens: int) -> str:
    """Merged maps of recurrent cells on x (N, B, D); of the class token alone for the last block.

    The class token is the first: a forward cell sees nothing else, a backward one ends with it.
    """
    kind, cells = maps.kind, maps.cells

    def sources(x: str) -> list[str]:
        d = cells[0].weight_ih.shape[1]
        return graph.split(f"{x}/head", x, [d] * maps.num_heads) if maps.pre else [x] * maps.num_heads

    x = graph.linear(f"{name}/pre_proj", x, *maps.pre) if maps.pre else x
    xs = sources(x)
    fronts = sources(graph.first(x)) if last else xs
    columns = torch.arange(sum(cell.units for cell in cells)).split([cell.units for cell in cells])
    by_head: list[list[Piece]] = []
    if kind.name == SCANNED:
        forward = _min_gru(graph, f"{name}/forward", fronts, cells[::2], 1 if last else tokens, False)
        reverse = _min_gru(graph, f"{name}/reverse", xs, cells[1::2], tokens, True)
        states = (forward, graph.first(reverse) if last else reverse)
        ways = [graph.split(f"{v}/head", v, [cell.units for cell in cells[r::2]]) for r, v in enumerate(states)]
        for h, values in enumerate(zip(*ways, strict=True)):
            by_head.append([Piece(values[r], [columns[2 * h + r]]) for r in range(2)])
    else:
        for h in range(maps.num_heads):
            title, pair, units = f"{name}/head{h}/{kind.name}", cells[2 * h : 2 * h + 2], columns[2 * h : 2 * h + 2]
            if pair[0].units == pair[1].units and not last:  # one node
                by_head.append([Piece(graph.recurrent(title, xs[h], kind, pair, "bidirectional"), list(units))])
                continue
            ways = zip(("forward", "reverse"), (fronts[h], xs[h]), pair, strict=True)
            values = [graph.recurrent(f"{title}/{way}", source, kind, [cell], way, last) for way, source, cell in ways]
            by_head.append([Piece(values[r], [units[r]]) for r in range(2)])

    of_cells = last or kind.name == SCANNED
    weight, bias = maps.out
    if not maps.heads:
        value, order = _join(graph, name, [piece for pieces in by_head for piece in pieces], of_cells)
        return graph.linear(f"{name}/out", value, weight[:, order], bias)
    parts, start = [], 0
    for h, (pieces, (head_proj, _)) in enumerate(zip(by_head, maps.heads, strict=True)):
        value, order = _join(graph, f"{name}/head{h}", pieces, of_cells)
        parts.append(graph.linear(f"{name}/head{h}/head_proj", value, head_proj[:, order - start], None))
        start += head_proj.shape[1]
    bias = bias + weight @ torch.cat([b for _, b in maps.heads])
    return graph.linear(f"{name}/out", graph.node("Concat", f"{name}/z", *parts, axis=2), weight, bias)


def _attention(graph: Graph, name: str, attn: Attention, x: str, last: bool) -> str:
    """timm's attention on x (N, B, D), its scale in the queries; of the class token alone for the last block."""
    weights = attn.qkv.weight.double().chunk(3)
    biases = [None] * 3 if attn.qkv.bias is None else attn.qkv.bias.double().chunk(3)
    parts = []
    for key, w, b, perm in zip("qkv", weights, biases, ((1, 2, 0, 3), (1, 2, 3, 0), (1, 2, 0, 3)), strict=True):
        title, scale = f"{name}/{key}", attn.scale if key == "q" else 1.0
        rows = graph.first(x) if last and key == "q" else x
        y = graph.linear(f"{title}/proj", rows, w * scale, None if b is None else b * scale)
        y = graph.reshape(f"{title}/heads", y, 0, 0, attn.num_heads, attn.head_dim)
        parts.append(graph.node("Transpose", title, y, perm=perm))
    scores = graph.node("MatMul", f"{name}/scores", *parts[:2])
    weights = graph.node("Softmax", f"{name}/softmax", scores, axis=-1)
    z = graph.node("MatMul", f"{name}/z", weights, parts[2])  # (B, H, N, d)
    z = graph.reshape(f"{name}/joined", graph.node("Transpose", f"{name}/tokens", z, perm=(2, 0, 1, 3)), 0, 0, -1)
    return graph.linear(f"{name}/out", z, attn.proj.weight, attn.proj.bias)


def _embed(graph: Graph, model: VisionTransformer, images: str) -> str:
    """Images (B, C, S, S) to tokens (N, B, D), prefix tokens and all biases in what is added as positions."""
    embed, positions, prefixed = model.patch_embed, model.pos_embed[0].double(), prefix_positions(model)
    prefix = torch.cat([token[0] for token in (model.cls_token, model.reg_token) if token is not None])
    bias = 0 if embed.proj.bias is None else embed.proj.bias
    first = prefix + F.pad(positions[:prefixed], (0, 0, 0, len(prefix) - prefixed))
    added = torch.cat([first, positions[prefixed:] + bias])
    x = graph.node("Conv", "patches", images, graph.weight("patches/W", embed.proj.weight), strides=embed.patch_size)
    x = graph.reshape("patches/row", x, 0, 0, -1)  # (B, D, patches)
    x = graph.node("Transpose", "patches/tokens", x, perm=(2, 0, 1))
    x = graph.node("Pad", "patches/prefix", x, graph.shape(len(prefix), 0, 0, 0, 0, 0))
    return graph.node("Add", "tokens", x, graph.weight("positions", added[:, None]))


def find_faults(model: VisionTransformer) -> str:
    """Which part has no form in this graph, in words; empty where all have."""
    for index, attn in replacements(model).items():
        maps = attn.maps()
        if maps is None or maps.kind.name not in (*CELLS, SCANNED):
            return f"block {index}: {type(attn).__name__}"
    return structure_fault(model)


@torch.no_grad()
def to_onnx(
    model: VisionTransformer, opset: int | None = None, properties: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Images (B, C, S, S), B free, to logits (B, classes). properties: what goes into the file's metadata.

    Raises FarError where the opset is unknown here, or the graph has no form for a part of the model.
    """
    opset = opset or OPSET
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise FarError(f"--opset {opset}: this needs one from {OPSETS[0]} to {OPSETS[1]}, the newest installed")
    if fault := find_faults(model):
        raise FarError(f"--to onnx: {fault}: the ONNX graph has no form for it; use --to pt2 or safetensors")
    model = without_scales(model)
    graph, embed, replaced = Graph(opset), model.patch_embed, replacements(model)
    tokens = embed.num_patches + model.num_prefix_tokens
    x = _embed(graph, model, "images")
    for index, block in enumerate(model.blocks):
        name, last = f"block{index}", index == len(model.blocks) - 1
        y = graph.norm(f"{name}/norm1", x, block.norm1)
        if index in replaced:  # merged in float64, so that only what is written is rounded
            y = _recurrence(graph, name, copy.deepcopy(replaced[index]).double().maps(), y, last, tokens)
        else:
            y = _attention(graph, name, block.attn, y, last)
        x = graph.node("Add", f"{name}/mixed", graph.first(x) if last else x, y)
        y = graph.norm(f"{name}/norm2", x, block.norm2)
        y = graph.linear(f"{name}/fc1", y, block.mlp.fc1.weight, block.mlp.fc1.bias)
        y = graph.gelu(f"{name}/gelu", y)
        y = graph.linear(f"{name}/fc2", y, block.mlp.fc2.weight, block.mlp.fc2.bias)
        x = graph.node("Add", name, x, y)
    x = graph.norm("norm", graph.reshape("class-token", x, -1, model.embed_dim), model.norm)
    graph.linear("logits", x, model.head.weight, model.head.bias)
    shapes = {"images": ["batch", model.patch_embed.proj.weight.shape[1], *embed.img_size]}
    shapes["logits"] = ["batch", model.num_classes]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    body = helper.make_graph(graph.nodes, "far", ends[:1], ends[1:], list(graph.weights.values()))
    opsets = [helper.make_opsetid("", opset)]
    onnx_model = helper.make_model(body, opset_imports=opsets, producer_name="FAR")
    # The newest version is refused by runtimes of last year.
    onnx_model.ir_version = helper.find_min_ir_version_for(opsets)
    helper.set_model_props(onnx_model, dict(properties or {}))
    onnx.checker.check_model(onnx_model, full_check=True)
    return onnx_model
