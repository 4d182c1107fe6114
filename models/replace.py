"""The swap, and a FAR model's configuration, which travels with its weights."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.bilstm import REPLACEMENTS, MultiHeadBiLSTM, Replacement
from models.deit import TEACHERS, create_teacher
from utils.checkpoint import load, load_into
from utils.errors import FarError

MLP_RATIO = 4  # of every DeiT here: an MLP's hidden units over the embedding width


@dataclass(frozen=True)
class FarConfig:
    """All that is needed to rebuild a model before its weights are loaded.

    replaced: indices of the replaced blocks; empty is a plain teacher.
    units: kept units u[h][r] of those replaced blocks that were pruned, by block index (as text: it is stored as JSON too).
    mlp: hidden units of those MLPs that were pruned, by block index.
    """

    base_model: str
    num_classes: int
    img_size: int
    rep_by: str = "multi-lstm"
    replaced: tuple[int, ...] = ()
    units: dict[str, list[list[int]]] = field(default_factory=dict)
    mlp: dict[str, int] = field(default_factory=dict)

    @property
    def pruned(self) -> bool:
        return bool(self.units or self.mlp)


def parse_blocks(text: str | Sequence[str], depth: int) -> tuple[int, ...]:
    """`0-11`, `0,2,5-7` or `0 2 5-7` to sorted block indices; `all` is every block. Raises FarError out of range."""
    words = (text if isinstance(text, str) else " ".join(text)).replace(",", " ").split()
    if not words or words == ["all"]:
        return tuple(range(depth))
    blocks: set[int] = set()
    for word in words:
        first, _, last = word.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or word.endswith("-"):
            raise FarError(f"--replace {word}: not a block or a range; write 0-11 or 0,2,5-7")
        low, high = int(first), int(last or first)
        if low > high or high >= depth:
            raise FarError(f"--replace {word}: blocks run from 0 to {depth - 1} in this model")
        blocks.update(range(low, high + 1))
    return tuple(sorted(blocks))


def swap_attention(model: VisionTransformer, blocks: Iterable[int], rep_by: str, init: str = "chrono", units=None) -> None:
    """Replaces the attention of the named blocks in place, post_proj carried over; blocks already replaced are left alone."""
    units = units or {}
    num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index in blocks:
        attn = model.blocks[index].attn
        if isinstance(attn, Replacement):
            continue
        new = REPLACEMENTS[rep_by](model.embed_dim, attn.num_heads, num_tokens, units.get(str(index)))
        new.init_from_attention(attn, init)
        model.blocks[index].attn = new.to(attn.proj.weight)


def replaced_blocks(model: VisionTransformer) -> tuple[int, ...]:
    return tuple(i for i, block in enumerate(model.blocks) if isinstance(block.attn, Replacement))


def describe(model: VisionTransformer, config: FarConfig) -> FarConfig:
    """The configuration of the model as it now is: which blocks are replaced, which units are left."""
    units = {}
    hidden = {str(i): block.mlp.fc1.out_features for i, block in enumerate(model.blocks)}
    hidden = {i: width for i, width in hidden.items() if width != MLP_RATIO * model.embed_dim}
    for index in (replaced := replaced_blocks(model)):
        attn = model.blocks[index].attn
        if isinstance(attn, MultiHeadBiLSTM):
            full = model.embed_dim // attn.num_heads
            if any(u != full for pair in attn.units for u in pair):
                units[str(index)] = attn.units
    return replace(config, num_classes=model.num_classes, replaced=replaced, units=units, mlp=hidden)


def set_backend(model: nn.Module, backend: str) -> None:
    """Chooses how the LSTMs are computed, `--lstm-backend`."""
    for module in model.modules():
        if isinstance(module, MultiHeadBiLSTM):
            module.backend = backend


def build(config: FarConfig, drop: float = 0.0, drop_path: float = 0.0) -> VisionTransformer:
    """The model a configuration describes, weights fresh."""
    model = create_teacher(config.base_model, config.num_classes, config.img_size, drop, drop_path)
    swap_attention(model, config.replaced, config.rep_by, units=config.units)
    for index, width in config.mlp.items():
        mlp = model.blocks[int(index)].mlp
        mlp.fc1, mlp.fc2 = nn.Linear(model.embed_dim, width), nn.Linear(width, model.embed_dim)
    return model


def pack(model: VisionTransformer, config: FarConfig) -> dict[str, Any]:
    """Weights and configuration as tensors and plain data: the layout of every FAR checkpoint."""
    return {"model": model.state_dict(), "config": asdict(describe(model, config))}


def read_config(content: dict[str, Any], source: str) -> FarConfig:
    """The configuration inside a checkpoint. Raises FarError where it has none or is of another kind."""
    stored = content.get("config")
    known = {f.name for f in fields(FarConfig)}
    if not isinstance(stored, dict) or not isinstance(content.get("model"), dict) or not set(stored) <= known:
        raise FarError(f"{source}: not a FAR checkpoint (no configuration inside); give one that FAR's main.py wrote")
    try:
        config = FarConfig(**{**stored, "replaced": tuple(stored["replaced"])})
    except (TypeError, KeyError) as error:
        raise FarError(f"{source}: its configuration is damaged; train or copy it again") from error
    if config.base_model not in TEACHERS or config.rep_by not in REPLACEMENTS:
        raise FarError(f"{source}: of an unknown architecture ({config.base_model}, {config.rep_by})")
    return config


def load_model(path: str | Path, flag: str, drop: float = 0.0, drop_path: float = 0.0):
    """Rebuilds a model from its checkpoint alone. Returns (model, configuration)."""
    content = load(path, flag)
    config = read_config(content, f"{flag} {path}")
    model = build(config, drop, drop_path)
    load_into(model, content["model"], f"{flag} {path}")
    return model, config


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def reset_classifier(model: VisionTransformer, num_classes: int, generator: torch.Generator | None = None) -> None:
    """A fresh classifier for a new label set."""
    model.reset_classifier(num_classes)
    nn.init.trunc_normal_(model.head.weight, std=0.02, generator=generator)
    nn.init.zeros_(model.head.bias)
