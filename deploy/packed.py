"""A FAR model or a plain DeiT as one operator on a CPU, images to logits, by the engine in models/kernels/cpp."""

import copy
from collections.abc import Collection
from typing import NamedTuple

import timm.layers
import torch
from timm.layers import LayerScale, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.kernels import Cell, cpu
from models.merged import Merged, hooked, plain, refuse_loading
from models.mingru import MinGRUCell
from models.parts import Mlp
from models.replace import replacements
from utils.errors import FarError

LAYOUT, NATURAL = 5, 0  # those of kernels/cpp/model.h
# Of products, by --fuse and --precision, in the order of model.h.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PRODUCTS = ("embed", "before", "w_hh", "heads", "out", "fc1", "fc2", "head")  # those that may stay float32 in int8
STEPS, TINY = 127, 1e-30  # of 8 bits, see kernels/cpp/dots.h; a scale that nothing is lost with


class Natural(NamedTuple):
    """A model's natural form (kernels/cpp/model.h), the same on every machine; products: float32, bfloat16 or int8."""

    plan: Tensor
    vectors: Tensor
    products: Tensor


class Writer:
    """Appends matrices to one array and vectors to another; returns where they begin.

    Arithmetic before rounding is in the dtype of the weights given. keep: of PRODUCTS, what stays float32 in int8.
    """

    def __init__(self, precision: torch.dtype, keep: Collection[str] = ()):
        keep = frozenset(keep)
        if unknown := keep - set(PRODUCTS):
            raise FarError(f"no products of the engine: {', '.join(sorted(unknown))}; it has {', '.join(PRODUCTS)}")
        self.keep = keep if precision == torch.int8 else ()
        self.dtypes = {"products": precision, "vectors": torch.float32}
        self.pieces: dict[str, list[Tensor]] = {name: [] for name in self.dtypes}
        self.lengths = dict.fromkeys(self.dtypes, 0)

    def _put(self, kind: str, piece: Tensor) -> int:
        place = self.lengths[kind]
        self.pieces[kind].append(piece.detach().to(self.dtypes[kind]).flatten())
        self.lengths[kind] += piece.numel()
        return place

    def matrix(self, w: Tensor, kept: bool = False) -> tuple[int, list[Tensor]]:
        """Its place, and in int8 the scales of its rows."""
        if self.dtypes["products"] != torch.int8:
            return self._put("products", w), []
        if kept:
            self._put("products", w.new_zeros(-self.lengths["products"] % 4))
            return self._put("products", w.detach().float().contiguous().view(torch.int8)), []
        scales = w.abs().amax(1) / STEPS
        return self._put("products", (w / scales.clamp_min(TINY)[:, None]).round()), [scales]

    def vector(self, v: Tensor) -> int:
        return self._put("vectors", v)

    def norm(self, norm: nn.LayerNorm) -> int:
        return self.vector(torch.cat([norm.weight, norm.bias, norm.weight.new_tensor([norm.eps])]))

    def map(self, name: str, w: Tensor, b: Tensor | None) -> list[int]:
        """The record of a linear map (Map in model.h); name: of PRODUCTS."""
        b = w.new_zeros(len(w)) if b is None else b
        place, scales = self.matrix(w, kept := name in self.keep)
        return [w.shape[1], len(w), place, self.vector(torch.cat([b, *scales])), int(kept)]

    def lstm(self, cell: Cell) -> list[int]:
        """Places of W_ih, W_hh and the bias of one direction (CellPlan), and whether W_hh is kept."""
        bias = cell.bias_ih + cell.bias_hh
        ih, scales = self.matrix(cell.weight_ih)
        hh, hidden = self.matrix(cell.weight_hh, kept := "w_hh" in self.keep)
        vectors = [bias, *scales, *([torch.zeros_like(bias)] if kept else hidden)]
        return [ih, hh, self.vector(torch.cat(vectors)), int(kept)]

    def min_gru(self, cell: MinGRUCell) -> list[int]:
        """The same of a minGRU, which has no W_hh."""
        place, scales = self.matrix(cell.weight_ih)
        return [place, 0, self.vector(torch.cat([cell.bias_ih, *scales])), 0]


# How a cell is written, by its kind: those that the engine computes.
CELLS = {"lstm": Writer.lstm, "mingru": Writer.min_gru}


def _recurrence(writer: Writer, maps: Merged) -> tuple[list[int], list[list[int]], list[list[int]], list[int]]:
    """Of a block with cells: [heads, gates, depth, mixed], cell and head records, `before` and `out` as one record."""
    before = writer.map("before", *maps.pre) if maps.pre else [0] * 5
    depth = maps.cells[0].weight_ih.shape[1]
    cells, column, write_cell = [], 0, CELLS[maps.kind.name]
    for i, cell in enumerate(maps.cells):
        start = i // 2 * depth if maps.pre else 0
        cells.append([cell.units, i % 2, start, column, *write_cell(writer, cell)])
        column += cell.units
    heads, start = [], 0
    for h, (weight, bias) in enumerate(maps.heads):
        heads.append([start, h * len(weight), *writer.map("heads", weight, bias)])
        start += weight.shape[1]
    cells.sort(key=lambda cell: -cell[0])
    return [0, maps.kind.gates, depth, column], cells, heads, before + writer.map("out", *maps.out)


def _attention(writer: Writer, attn: Attention) -> tuple[list[int], list, list, list[int]]:
    """The same of a block with attention, whose scale is multiplied into the queries."""
    w, b = attn.qkv.weight.double(), attn.qkv.bias
    b = w.new_zeros(len(w)) if b is None else b.double()
    scale = torch.ones_like(b)
    scale[: attn.attn_dim] = attn.scale
    before = writer.map("before", w * scale[:, None], b * scale)
    maps = before + writer.map("out", attn.proj.weight, attn.proj.bias)
    return [attn.num_heads, 0, attn.head_dim, attn.attn_dim], [], [], maps


@torch.no_grad()
def natural_form(model: VisionTransformer, precision: torch.dtype, keep: Collection[str] = ()) -> Natural:
    """A model without a `structure_fault`: a header, a record a block, records of cells and projections.

    keep: of PRODUCTS, what stays float32 in int8.
    """
    writer, model = Writer(precision, keep), without_scales(model)
    embed = model.patch_embed
    bias = model.pos_embed.new_zeros(model.embed_dim) if embed.proj.bias is None else embed.proj.bias
    tokens = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
    positions, prefix = model.pos_embed[0], torch.cat(tokens)
    if not model.no_embed_class:
        prefix, positions = prefix + positions[: len(prefix)], positions[len(prefix) :]
    header = [*embed.proj.weight.shape[1:2], *embed.img_size, *embed.patch_size]
    header += [len(prefix), model.embed_dim, len(model.blocks), len(model.head.weight)]
    header += [writer.vector(prefix), writer.vector(positions + bias), writer.norm(model.norm)]
    header += writer.map("embed", embed.proj.weight.flatten(1), None)
    header += writer.map("head", model.head.weight, model.head.bias)
    start, records, behind, replaced = 4 + len(header), [], [], replacements(model)
    for i, block in enumerate(model.blocks):
        # Merged in float64, so that only what is written is rounded.
        maps = copy.deepcopy(replaced[i]).double().maps() if i in replaced else None
        shape, cells, heads, maps = _recurrence(writer, maps) if maps else _attention(writer, block.attn)
        tables = []
        for table in (cells, heads):
            tables += [len(behind), len(table)]
            behind += [number for record in table for number in record]
        records.append([writer.norm(block.norm1), writer.norm(block.norm2), *shape, *tables, *maps])
        for name in ("fc1", "fc2"):
            part = getattr(block.mlp, name)
            records[-1] += writer.map(name, part.weight, part.bias)
    start += sum(map(len, records))
    for record in records:
        record[6] += start
        record[8] += start
    plan = header + [number for record in records for number in record] + behind
    plan = [LAYOUT, NATURAL, [*PRECISIONS.values()].index(precision), 4 + len(plan), *plan]
    return Natural(torch.tensor(plan), *(torch.cat(writer.pieces[name]) for name in ("vectors", "products")))


def _plain_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def computes_as_timms(model: nn.Module) -> bool:
    """True if no subclass overrides timm's forward path."""
    methods = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
    return all(getattr(type(model), name, None) is getattr(VisionTransformer, name) for name in methods)


def _identity(*modules: nn.Module) -> bool:
    return all(isinstance(module, nn.Identity) for module in modules)


def _is_scale(module: nn.Module) -> bool:
    return type(module) is LayerScale and not hooked(module)


@torch.no_grad()
def without_scales(model: VisionTransformer) -> VisionTransformer:
    """The model with each LayerScale multiplied into the linear map before it: a copy where there is any."""
    if not any(map(_is_scale, model.modules())):
        return model
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name, linear in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            if _is_scale(scale := getattr(block, name)):
                linear.weight = nn.Parameter(linear.weight * scale.gamma[:, None], requires_grad=False)
                if linear.bias is not None:
                    linear.bias = nn.Parameter(linear.bias * scale.gamma, requires_grad=False)
                setattr(block, name, nn.Identity())
    return model


def structure_fault(model: nn.Module) -> str:
    """Why a model is not timm's plain VisionTransformer with replacements, which all fused forms assume; else empty."""
    if not computes_as_timms(model):
        return f"{type(model).__name__} computes otherwise than timm's VisionTransformer"
    embed, conv = model.patch_embed, model.patch_embed.proj
    if type(embed) is not PatchEmbed or not embed.flatten or embed.dynamic_img_pad or not _identity(embed.norm):
        return "a patch embedding that is not timm's plain PatchEmbed"
    if conv.kernel_size != conv.stride or any(conv.padding) or conv.groups != 1 or not embed.strict_img_size:
        return "patches that overlap or images of any size"
    if model.global_pool != "token" or model.attn_pool is not None or not model.has_class_token:
        return "a classifier that does not read the class token"
    if not _identity(model.norm_pre, model.fc_norm) or not _plain_norm(model.norm):
        return "norms elsewhere than before each half of a block and behind the last"
    if model.pos_embed is None or model.dynamic_img_size or not plain(model.head):
        return "no learned positions or no linear classifier"
    replaced = replacements(model)
    for i, block in enumerate(model.blocks):
        if type(block) is not Block or not all(_identity(ls) or _is_scale(ls) for ls in (block.ls1, block.ls2)):
            return "a block that is not timm's plain Block"
        if not (_plain_norm(block.norm1) and _plain_norm(block.norm2)):
            return "a norm that is not LayerNorm"
        attn, mlp = block.attn, block.mlp
        known = type(mlp) in (Mlp, timm.layers.Mlp) and plain(mlp.fc1, mlp.fc2) and _identity(mlp.norm)
        if not known or not isinstance(mlp.act, nn.GELU) or mlp.act.approximate != "none":
            return "an MLP that is not Linear, GELU, Linear"
        if i in replaced:
            continue
        if type(attn) is not Attention or not plain(attn.qkv, attn.proj):
            return f"{type(attn).__name__} in attention's place"
        gated = attn.gate is not None or attn.attn_dim != model.embed_dim
        if gated or not _identity(attn.q_norm, attn.k_norm, attn.norm):
            return "attention with norms or a gate"
    return ""


def fault(model: nn.Module) -> str:
    """Why the engine does not compute a model, on whatever machine; empty where it does."""
    if reason := structure_fault(model):
        return reason
    if hooked(*model.modules()):
        return "hooks on its modules"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return "weights that are not float32 on a CPU"
    for attn in replacements(model).values():
        maps = attn.maps()
        if maps is None or maps.kind.name not in CELLS:
            return f"{type(attn).__name__} in attention's place"
        if maps.backend not in ("auto", "cpu"):
            return f"its cells use --lstm-backend {maps.backend}"
    return ""


def why_not(model: nn.Module, precision: torch.dtype = torch.float32) -> str:
    """Why `PackedModel` cannot serve this model, in words; empty where it can."""
    if not cpu.available():
        return "the C++ kernel cannot be built here"
    if precision not in PRECISIONS.values():
        return f"{precision} is none of {', '.join(PRECISIONS)}"
    lacks = precision == torch.bfloat16 and not cpu.has_bfloat16()
    return fault(model) or ("bfloat16 needs a CPU with AVX512_BF16" if lacks else "")


class PackedModel(nn.Module):
    """The function of a FAR model or a DeiT without gradients: images (B, C, S, S) to logits (B, classes).

    precision: of weights and activations in matrix products; sums, norms, gates and states stay float32. keep: of
    PRODUCTS, what stays float32 in int8. The model is copied, not changed. Raises FarError where `why_not` names a
    reason.
    """

    def __init__(self, model: VisionTransformer, precision: torch.dtype = torch.float32, keep: Collection[str] = ()):
        super().__init__()
        if reason := why_not(model, precision):
            raise FarError(f"this model cannot be packed for the CPU: {reason}")
        plan, vectors, products = cpu.load(cpu.TUNED).pack(*natural_form(model, precision, keep))
        self.products, self.vectors = (nn.Parameter(numbers, requires_grad=False) for numbers in (products, vectors))
        self.register_buffer("plan", plan)
        self.num_classes = len(model.head.weight)
        self.shape = tuple(plan[4:7].tolist())  # of an image
        self.register_load_state_dict_pre_hook(refuse_loading)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.layout != torch.strided or images.is_nested:
            raise FarError("this model reads dense tensors of images")
        traced = torch.compiler.is_compiling()
        forward = not traced and torch.autograd.forward_ad.unpack_dual(images).tangent is not None
        if forward or torch.is_grad_enabled() and (images.requires_grad or self.products.requires_grad):
            raise FarError("a fused model has no gradients: take them before fuse(), or call it under torch.no_grad()")
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape or not images.is_floating_point():
            got = f"{tuple(images.shape)}, {images.dtype}"
            raise FarError(f"this model reads images (B, {', '.join(map(str, self.shape))}) of floats, not {got}")
        if images.device != self.products.device:
            raise FarError(f"this model was fused for the CPU: images on {images.device} must be moved there")
        return torch.ops.far.model(images.float(), self.plan, self.vectors, self.products, self.num_classes)

    def forward_features(self, *_, **__):
        raise FarError("a model fused as one operator gives logits alone; ask the unfused model for features")

    forward_intermediates = get_intermediate_layers = forward_head = forward_features

    def _apply(self, fn, recurse: bool = True):
        for weight in (self.products, self.vectors):
            moved = fn(weight)
            if (moved.dtype, moved.device.type) != (weight.dtype, "cpu"):
                raise FarError(
                    f"a model fused for the CPU kernel cannot become {moved.dtype} on {moved.device}; "
                    "move it first, then fuse"
                )
        return super()._apply(fn, recurse)
