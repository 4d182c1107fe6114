"""The swap, and a FAR model's configuration, which travels with its weights."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.bigru import MultiHeadBiGRU
from models.bilstm import MultiHeadBiLSTM, SingleLSTM
from models.deit import check_size, create_teacher, find_teacher
from models.mingru import MultiHeadBiMinGRU
from models.mixer import TokenMixer
from models.parts import BlockPart, Mlp, Replacement
from models.vit import classifiers
from utils.checkpoint import load, load_into
from utils.errors import FarError, first_line
from utils.preprocessing import Preprocessing

# What --rep-by names; a new one is a class, a line here and its name in utils.names.
REPLACEMENTS: dict[str, type[Replacement]] = {
    "multi-lstm": MultiHeadBiLSTM,
    "lstm": SingleLSTM,
    "gru": MultiHeadBiGRU,
    "mingru": MultiHeadBiMinGRU,
    "mixer": TokenMixer,
}
BLOCKS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")  # a block, or a range of them


@dataclass(frozen=True)
class FarConfig:
    """All that is needed to rebuild a model before its weights are loaded.

    Args:
        base_model: a name that `find_teacher` knows.
        num_classes: 0 is a teacher without a classifier.
        img_size: image side in pixels.
        rep_by: a name of REPLACEMENTS.
        replaced: indices of the replaced blocks; empty is a plain teacher.
        units: kept units u[h][r] of the replaced blocks that were pruned, by block index (text, as in JSON).
        mlp: hidden units of the MLPs that were pruned, by block index.
        preprocessing: how images become its input; None is unknown.
        classes: names of its classes; empty is unknown.
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
    def expected_preprocessing(self) -> Preprocessing | None:
        """How images become its input: as stored, else as the teacher was trained; None is unknown."""
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
    """Replaces the attention of blocks in place; post_proj starts as a copy of attn.proj. Replaced blocks stay."""
    units = units or {}
    num_tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index in sorted(set(blocks) - set(replacements(model))):
        attn = model.blocks[index].attn
        new = REPLACEMENTS[rep_by](model.embed_dim, attn.num_heads, num_tokens, units.get(str(index)))
        new.init_from_attention(attn, init)
        model.blocks[index].attn = new.to(attn.proj.weight)


def replacements(model: VisionTransformer) -> dict[int, Replacement]:
    """The modules that replace attention, by block index."""
    attns = {i: getattr(block, "attn", None) for i, block in enumerate(model.blocks)}
    return {i: attn for i, attn in attns.items() if isinstance(attn, Replacement)}


def mlps(model: VisionTransformer) -> dict[int, Mlp]:
    """The MLPs whose units can be pruned, by block index: none where they are gated or have a norm inside."""
    return {i: block.mlp for i, block in enumerate(model.blocks) if hasattr(block.mlp, "unit_norms")}


def pruned_sizes(parts: Mapping[int, BlockPart]) -> dict[str, Any]:
    """Sizes of the parts that were pruned, by block index."""
    return {str(i): part.sizes for i, part in parts.items() if part.sizes != part.full_sizes}


def describe(model: VisionTransformer, config: FarConfig) -> FarConfig:
    """The configuration of the model as it is now: which blocks are replaced, which units are left."""
    return replace(
        config,
        num_classes=model.num_classes,
        img_size=model.patch_embed.img_size[0],
        replaced=tuple(replacements(model)),
        units=pruned_sizes(replacements(model)),
        mlp=pruned_sizes(mlps(model)),
        classes=config.classes if len(config.classes) == model.num_classes else (),
    )


def set_backend(model: VisionTransformer, backend: str) -> None:
    """Sets the kernel, a `--lstm-backend`, of every replacement."""
    for attn in replacements(model).values():
        attn.backend = backend


def build(config: FarConfig, drop: float = 0.0, drop_path: float = 0.0) -> VisionTransformer:
    """The model of a configuration, with fresh weights."""
    model = create_teacher(config.base_model, config.num_classes, config.img_size, drop, drop_path)
    swap_attention(model, config.replaced, config.rep_by, units=config.units)
    for index, width in config.mlp.items():
        model.blocks[int(index)].mlp.resize(width)
    return model


def pruned_to(config: FarConfig, share: float, mlp: float = 1.0) -> FarConfig:
    """The configuration with these shares of the hidden units of replacements and of MLPs, at least one in a place."""

    def kept(sizes: Any, share: float) -> Any:
        return [kept(part, share) for part in sizes] if isinstance(sizes, list) else max(1, round(share * sizes))

    with torch.device("meta"):
        model = build(config)
    if share < 1:
        units = {str(i): kept(part.sizes, share) for i, part in replacements(model).items() if part.sizes}
        config = replace(config, units=units)
    if mlp < 1:
        config = replace(config, mlp={str(i): kept(part.sizes, mlp) for i, part in mlps(model).items()})
    return config


def pack(model: VisionTransformer, config: FarConfig) -> dict[str, Any]:
    """Weights and configuration as tensors and plain data: the layout of every FAR checkpoint."""
    return {"model": model.state_dict(), "config": asdict(describe(model, config))}


def read_config(content: dict[str, Any], source: str) -> FarConfig:
    """The configuration inside a checkpoint. Raises FarError where it has none, or a damaged one."""
    stored = content.get("config")
    known = {f.name for f in fields(FarConfig)}
    if not isinstance(stored, dict) or not isinstance(content.get("model"), dict) or not set(stored) <= known:
        raise FarError(
            f"{source}: not a FAR checkpoint (no configuration inside); give one that main.py wrote or convert.py made"
        )
    if lacking := {"base_model", "num_classes", "img_size"} - stored.keys():
        raise FarError(f"{source}: its configuration lacks {min(lacking)}; train or copy it again")
    try:
        config = FarConfig(**stored)
        find_teacher(config.base_model)
        preprocessing = None if config.preprocessing is None else Preprocessing.read(config.preprocessing)
        units = {block: [list(pair) for pair in heads] for block, heads in config.units.items()}
        if len(config.classes) not in (0, config.num_classes) or not all(isinstance(c, str) for c in config.classes):
            raise ValueError(f"classes must be {config.num_classes} names, or none")
        plain = {"preprocessing": preprocessing, "units": units, "classes": tuple(config.classes)}
        return replace(config, replaced=tuple(sorted(config.replaced)), **plain)
    except Exception as error:  # noqa: BLE001  (a value of a wrong type fails in a dozen ways; each means the same)
        raise FarError(
            f"{source}: its configuration is damaged: {first_line(error)}; train or copy it again"
        ) from error


def build_on_meta(config: FarConfig, source: str, drop: float = 0.0, drop_path: float = 0.0) -> VisionTransformer:
    """The model of a file's configuration, nothing allocated yet. Raises FarError where there is no such model."""
    try:
        with torch.device("meta"):
            model = build(config, drop, drop_path)
        for part in (*replacements(model).values(), *mlps(model).values()):
            sizes, full = torch.tensor(part.sizes), torch.tensor(part.full_sizes)
            if not ((sizes >= 1) & (sizes <= full)).all():
                raise ValueError(f"units must be from 1 to those of an unpruned block, {part.full_sizes}")
    except Exception as error:  # noqa: BLE001  (as above)
        raise FarError(f"{source}: weights of no model here: {first_line(error)}; train or copy it again") from error
    return model


def restore(
    config: FarConfig, state: dict[str, Tensor], source: str, drop: float = 0.0, drop_path: float = 0.0
) -> VisionTransformer:
    """The model of a checkpoint's configuration and weights, in eval mode. Raises FarError where they disagree."""
    if not config.num_classes:
        raise FarError(f"{source}: num_classes is 0, no classifier; train one with --mode teacher --base-weight FILE")
    model = build_on_meta(config, source, drop, drop_path)
    load_into(model, state, source)
    return model.eval()


def load_model(
    path: str | Path, flag: str = "", drop: float = 0.0, drop_path: float = 0.0
) -> tuple[VisionTransformer, FarConfig]:
    """Rebuilds a model from its checkpoint alone, in eval mode. Returns (model, configuration)."""
    content, source = load(path, flag), f"{flag} {path}".strip()
    config = read_config(content, source)
    return restore(config, content["model"], source, drop, drop_path), config


def set_input_size(model: VisionTransformer, img_size: int | tuple[int, int]) -> None:
    """timm's, which resizes position embeddings. Raises FarError where a replacement is tied to its token count."""
    patches = [side // cut for side, cut in zip(to_2tuple(img_size), model.patch_embed.patch_size, strict=True)]
    for attn in replacements(model).values():
        attn.check_tokens(model.num_prefix_tokens + math.prod(patches))
    model.set_input_size(img_size)


def resize(model: VisionTransformer, config: FarConfig, img_size: int, source: str) -> FarConfig:
    """Resizes the model to another image side in place, positions interpolated by timm. Returns its configuration.

    Raises FarError where the size cuts patches off, or a replacement is tied to its number of tokens.
    """
    check_size(config.base_model, img_size)
    try:
        set_input_size(model, img_size)
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
