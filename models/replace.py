"""The swap, and a FAR model's configuration, which travels with its weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.bigru import MultiHeadBiGRU
from models.bilstm import MultiHeadBiLSTM, SingleLSTM
from models.deit import LARGEST_INPUT, check_size, create_teacher, find_teacher, fits_patches
from models.mixer import TokenMixer
from models.parts import BlockPart, Mlp, Replacement
from models.vit import classifiers
from utils.checkpoint import load, load_into, whole
from utils.errors import FarError
from utils.preprocessing import Preprocessing

# What --rep-by names; a new one is a class, a line here and its name in utils.names.
REPLACEMENTS: dict[str, type[Replacement]] = {
    "multi-lstm": MultiHeadBiLSTM,
    "lstm": SingleLSTM,
    "gru": MultiHeadBiGRU,
    "mixer": TokenMixer,
}
MOST_CLASSES = 10**6
MOST_PARAMETERS = 2**31  # 8 GiB, timm's largest; a file of some bytes can claim more, one number repeated
BLOCKS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")  # a block, or a range of them


@dataclass(frozen=True)
class FarConfig:
    """All that is needed to rebuild a model before its weights are loaded.

    base_model: a name that `find_teacher` knows. num_classes: 0 is a teacher without a classifier. replaced: indices
    of the replaced blocks; empty is a plain teacher. units: kept units u[h][r] of those replaced blocks that were
    pruned, by block index (as text: it is stored as JSON too). mlp: hidden units of those MLPs that were pruned, by
    block index. preprocessing, classes: how pictures become its input, and the names of its classes; None and empty
    are unknown.
    """

    base_model: str
    num_classes: int
    img_size: int
    rep_by: str = "multi-lstm"
    replaced: tuple[int, ...] = ()
    units: dict[str, list[list[int]]] = field(default_factory=dict)
    mlp: dict[str, int] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()

    @property
    def reading(self) -> Preprocessing | None:
        """How pictures become its input: as stored, else as the teacher's weights know them; None is unknown."""
        return self.preprocessing or find_teacher(self.base_model).preprocessing

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
        match = BLOCKS.fullmatch(word)
        if match is None:
            raise FarError(f"--replace {word}: not a block or a range; write 0-11 or 0,2,5-7")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high or high >= depth:
            raise FarError(f"--replace {word}: blocks run from 0 to {depth - 1} in this model")
        blocks.update(range(low, high + 1))
    return tuple(sorted(blocks))


def swap_attention(
    model: VisionTransformer, blocks: Iterable[int], rep_by: str, init: str = "chrono", units=None
) -> None:
    """Replaces the attention of the named blocks in place, post_proj carried over; replaced ones are left alone."""
    units = units or {}
    num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index in sorted(set(blocks) - set(replacements(model))):
        attn = model.blocks[index].attn
        new = REPLACEMENTS[rep_by](model.embed_dim, attn.num_heads, num_tokens, units.get(str(index)))
        new.init_from_attention(attn, init)
        model.blocks[index].attn = new.to(attn.proj.weight)


def replacements(model: VisionTransformer) -> dict[int, Replacement]:
    """What replaces attention, by block."""
    found = {i: getattr(block, "attn", None) for i, block in enumerate(model.blocks)}
    return {i: attn for i, attn in found.items() if isinstance(attn, Replacement)}


def mlps(model: VisionTransformer) -> dict[int, Mlp]:
    """The MLPs whose units can be pruned, by block: none where they are gated or have a norm inside."""
    return {i: block.mlp for i, block in enumerate(model.blocks) if hasattr(block.mlp, "unit_norms")}


def replaced_blocks(model: VisionTransformer) -> tuple[int, ...]:
    return tuple(replacements(model))


def pruned_sizes(parts: Mapping[int, BlockPart]) -> dict[str, Any]:
    """Sizes of those parts that were pruned, by block."""
    return {str(i): part.sizes for i, part in parts.items() if part.sizes != part.full_sizes}


def describe(model: VisionTransformer, config: FarConfig) -> FarConfig:
    """The configuration of the model as it now is: which blocks are replaced, which units are left."""
    found = replacements(model)
    sizes = {"units": pruned_sizes(found), "mlp": pruned_sizes(mlps(model))}
    classes = config.classes if len(config.classes) == model.num_classes else ()
    img_size = model.patch_embed.img_size[0]
    return replace(
        config, num_classes=model.num_classes, img_size=img_size, replaced=tuple(found), classes=classes, **sizes
    )


def set_backend(model: VisionTransformer, backend: str) -> None:
    """Sets the kernel, a `--lstm-backend`, of every replacement."""
    for attn in replacements(model).values():
        attn.backend = backend


def build(config: FarConfig, drop: float = 0.0, drop_path: float = 0.0) -> VisionTransformer:
    """The model a configuration describes, weights fresh."""
    model = create_teacher(config.base_model, config.num_classes, config.img_size, drop, drop_path)
    swap_attention(model, config.replaced, config.rep_by, units=config.units)
    for index, width in config.mlp.items():
        model.blocks[int(index)].mlp.resize(width)
    return model


def pack(model: VisionTransformer, config: FarConfig) -> dict[str, Any]:
    """Weights and configuration as tensors and plain data: the layout of every FAR checkpoint."""
    return {"model": model.state_dict(), "config": asdict(describe(model, config))}


def is_nest(value: Any, full: Sequence) -> bool:
    """Whether `value` is nested like `full`, each number from 1 to the one in its place."""
    if isinstance(full, int):
        return whole(value, 1, full)
    return isinstance(value, list | tuple) and len(value) == len(full) and all(map(is_nest, value, full))


def find_damage(config: FarConfig) -> str:
    """What is wrong with a configuration from a file, in words; empty where nothing is. Allocates nothing."""
    if not isinstance(config.base_model, str):
        return "base_model must be a name"
    try:
        find_teacher(config.base_model)
    except FarError as error:
        return f"base_model: {error}"
    if not isinstance(config.rep_by, str) or config.rep_by not in REPLACEMENTS:
        return f"rep_by is none of {', '.join(REPLACEMENTS)}"
    if not whole(config.num_classes, 0, MOST_CLASSES):
        return f"num_classes must be a whole number from 0 to {MOST_CLASSES}"
    if not fits_patches(config.base_model, config.img_size):
        return f"img_size must be a multiple of {find_teacher(config.base_model).patch_size} up to {LARGEST_INPUT}"
    with torch.device("meta"):
        model = create_teacher(config.base_model, config.num_classes, config.img_size)
        swap_attention(model, (0,), config.rep_by)
    blocks, full = range(len(model.blocks)), model.blocks[0].attn.full_sizes
    replaced = config.replaced if isinstance(config.replaced, list | tuple) else (None,)
    if not all(whole(i, 0, blocks[-1]) for i in replaced) or len(set(replaced)) < len(replaced):
        return f"replaced must be different blocks from 0 to {blocks[-1]}"
    hidden = next((mlp.full_sizes for mlp in mlps(model).values()), ())
    for name, owners, most in (("units", replaced, full), ("mlp", blocks, hidden)):
        kept = getattr(config, name)
        if not isinstance(kept, dict) or not set(kept) <= set(map(str, owners)):
            return f"{name} must be a dictionary by block, of {sorted(owners)}"
        if not most and kept or not all(is_nest(value, most) for value in kept.values()):
            return f"{name} must be whole numbers from 1 to those of an unpruned block, {most}"
    return find_reading_damage(config)


def find_reading_damage(config: FarConfig) -> str:
    """The same of what is said about pictures and classes."""
    names = config.classes
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return "classes must be a list of names"
    if len(names) not in (0, config.num_classes):
        return f"classes must be {config.num_classes} names, or none"
    try:
        config.preprocessing is None or Preprocessing.read(config.preprocessing)
    except ValueError as error:
        return f"preprocessing {error}"
    return ""


def read_config(content: dict[str, Any], source: str) -> FarConfig:
    """The configuration inside a checkpoint. Raises FarError where it has none or one that no model can have."""
    stored = content.get("config")
    known = {f.name for f in fields(FarConfig)}
    if not isinstance(stored, dict) or not isinstance(content.get("model"), dict) or not set(stored) <= known:
        raise FarError(
            f"{source}: not a FAR checkpoint (no configuration inside); give one that main.py wrote or convert.py made"
        )
    if lacking := {"base_model", "num_classes", "img_size"} - stored.keys():
        raise FarError(f"{source}: its configuration lacks {min(lacking)}; train or copy it again")
    config = FarConfig(**stored)
    if damage := find_damage(config):
        raise FarError(f"{source}: its configuration is damaged: {damage}; train or copy it again")
    units = {index: [list(pair) for pair in heads] for index, heads in config.units.items()}
    reading = None if config.preprocessing is None else Preprocessing.read(config.preprocessing)
    plain = {"units": units, "preprocessing": reading, "classes": tuple(config.classes)}
    return replace(config, replaced=tuple(sorted(config.replaced)), **plain)


def build_on_meta(config: FarConfig, source: str, drop: float = 0.0, drop_path: float = 0.0) -> VisionTransformer:
    """The model of a file's configuration before anything is allocated. Raises FarError where it is too large."""
    with torch.device("meta"):
        model = build(config, drop, drop_path)
    if (count := count_parameters(model)) > MOST_PARAMETERS:
        raise FarError(f"{source}: describes {count:,} parameters, more than any model here; train or copy it again")
    return model


def restore(content: dict[str, Any], source: str, drop: float = 0.0, drop_path: float = 0.0):
    """The model a checkpoint's content holds, in eval mode, and its configuration. Raises FarError where they disagree.

    Nothing is allocated before the tensors are known to be the model's: it is built on meta, then takes copies of them.
    """
    config = read_config(content, source)
    if not config.num_classes:
        raise FarError(f"{source}: num_classes is 0, no classifier; train one with --mode teacher --base-weight FILE")
    model = build_on_meta(config, source, drop, drop_path)
    load_into(model, content["model"], source)
    return model.eval(), config


def load_model(path: str | Path, flag: str = "", drop: float = 0.0, drop_path: float = 0.0):
    """Rebuilds a model from its checkpoint alone, in eval mode. Returns (model, configuration)."""
    return restore(load(path, flag), f"{flag} {path}".strip(), drop, drop_path)


def resize(model: VisionTransformer, config: FarConfig, img_size: int, source: str) -> FarConfig:
    """Takes the model to another image size, its positions interpolated by timm; the configuration of that.

    Raises FarError where the size cuts patches off, or a replacement is tied to its number of tokens.
    """
    check_size(config.base_model, img_size)
    try:
        model.set_input_size(img_size)
    except FarError as error:
        raise FarError(f"--input-size {img_size}: {source}: {error}") from error
    return replace(config, img_size=img_size)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def reset_classifier(model: VisionTransformer, num_classes: int, generator: torch.Generator | None = None) -> None:
    """A fresh classifier for a new label set."""
    model.reset_classifier(num_classes)
    for head in classifiers(model):
        nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
        nn.init.zeros_(head.bias)
