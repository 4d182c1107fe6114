"""A checkpoint file, opened once: its weights, and what it says of the model they belong to."""

import re
from dataclasses import dataclass
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.deit import create_teacher, find_teacher, named_teacher, resize_positions
from models.replace import FarConfig, load_model, read_config, restore
from utils.checkpoint import FLOATS, check_dense, load, load_into, weights_of
from utils.configs import ModelName
from utils.errors import FarError


@dataclass(frozen=True)
class Weights:
    """What one file holds.

    Args:
        source: the flag and the file, which error messages begin with.
        state: the state dict by timm's names.
        config: of a checkpoint of ours, with how it expects images; None in a plain state dict, which does not say
            which model it belongs to.
    """

    source: str
    state: dict[str, Tensor]
    config: FarConfig | None = None

    @property
    def num_classes(self) -> int:
        """Classes of the classifier; 0 without one."""
        head = self.state.get("head.weight")
        return len(head) if isinstance(head, Tensor) and head.ndim else 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where the file does not hold them."""
        return self.config.classes if self.config else ()


def read(path: str | Path, flag: str = "") -> Weights:
    """Opens a checkpoint of ours or a state dict in timm's or DeiT's layout (.pth or .safetensors).

    Args:
        path: the file.
        flag: the flag the user named it with, for messages.

    Raises:
        FarError: no file, damaged, a pickle, or a configuration that no model can have.
    """
    content, source = load(path, flag), f"{flag} {path}".strip()
    if isinstance(content.get("config"), dict) and "base_model" in content["config"]:
        config = read_config(content, source)
        return Weights(source, content["model"], config)
    state = weights_of(content)
    return Weights(source, {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in state.items()})  # DeiT-III's


def check_named(name: ModelName, source: str, config: FarConfig) -> None:
    """Raises FarError where a flag names another architecture than the file of `source` holds."""
    named = named_teacher(name)
    held = find_teacher(config.base_model).architecture or config.base_model  # one for every tag of pretrained weights
    if name.named is not None and (named.architecture or name.named) != held:
        flag = "--base-model" if name.base_model else "--scale"
        raise FarError(f"{flag}: says {name.named}, but {source} holds a {config.base_model}; make them agree")


def teacher_config(weights: Weights, name: ModelName) -> FarConfig:
    """The teacher that weights belong to: the file's own configuration, else the model that the flags name.

    Raises FarError where the file holds no teacher, or another one than the flags name.
    """
    check_teacher(weights)
    if weights.config:
        check_named(name, weights.source, weights.config)
        return weights.config
    teacher = named_teacher(name)
    return FarConfig(name.name, weights.num_classes, teacher.input_size, preprocessing=teacher.preprocessing)


def check_teacher(weights: Weights) -> None:
    """Raises FarError unless a file holds the weights of a vision transformer with attention in every block."""
    if "pos_embed" not in weights.state:
        raise FarError(f"{weights.source}: holds no vision transformer's weights; give timm's or DeiT's layout")
    if any(".post_proj." in name for name in weights.state):
        raise FarError(f"{weights.source}: is a FAR model, not a teacher; give it as --far-weight or --attn-weight")
    for name, value in weights.state.items():
        check_dense(value, FLOATS, name, weights.source)


def load_teacher_weights(model: VisionTransformer, weights: Weights, keep_head: bool = True) -> None:
    """Loads a teacher's weights into a model; position embeddings are interpolated by timm to the model's size.

    keep_head: False leaves the model's own classifier; True needs one in the file, of as many classes.
    """
    check_teacher(weights)
    state = resize_positions(weights.state, model, weights.source)
    head = state.get("head.weight")
    if not keep_head:
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith(("head.", "head_dist."))}}
    elif head is None or head.ndim == 2 and len(head) != model.num_classes:
        raise FarError(
            f"{weights.source}: its classifier has {weights.num_classes} classes, --dataset needs "
            f"{model.num_classes}; train a teacher on this data first with --mode teacher"
        )
    load_into(model, state, weights.source)


def load_any(name: ModelName, path: Path, flag: str, teacher: bool) -> tuple[VisionTransformer, FarConfig]:
    """The model of a file, in eval mode, and its configuration.

    Args:
        name: the model that flags name; a plain state dict is taken for it.
        path: the file.
        flag: the flag the user named it with.
        teacher: True takes a teacher, of any layout; False a checkpoint of ours.
    """
    if not teacher:
        model, config = load_model(path, flag)
        check_named(name, f"{flag} {path}", config)
        return model, config
    weights = read(path, flag)
    config = teacher_config(weights, name)
    if weights.config:
        return restore(config, weights.state, weights.source), config
    model = create_teacher(config.base_model, max(1, config.num_classes), config.img_size)
    load_teacher_weights(model, weights)
    return model.eval(), config
