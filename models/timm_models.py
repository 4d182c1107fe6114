"""FAR models in timm's registry: `import models.timm_models`, then `timm.create_model("far_deit_tiny_patch16_224")`."""

import logging
from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from models.deit import resize_positions
from models.hub import data_config
from models.infer import infer_far
from models.replace import build_on_meta, set_input_size, swap_attention
from models.vit import adapt_mlps
from utils.errors import FarError

log = logging.getLogger(__name__)


class FarDeiT(VisionTransformer):
    """A DeiT whose attentions are multi-head BiLSTMs until it loads a FAR state dict.

    The first state dict it loads determines which blocks are replaced and by what, the units left, and those of
    `adopts` (num_classes, img_size) that the caller did not pass. Later ones are loaded as torch does.
    """

    def __init__(self, adopts: frozenset[str] = frozenset(), **kwargs):
        super().__init__(**kwargs)
        self.adopts: frozenset[str] | None = adopts
        swap_attention(adapt_mlps(self), range(len(self.blocks)), "multi-lstm")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        if self.adopts is not None:
            state_dict, self.adopts = self.take_shape(dict(state_dict), self.adopts), None
        return super().load_state_dict(state_dict, strict, assign)

    def take_shape(self, state: dict[str, Any], adopts: frozenset[str]) -> dict[str, Any]:
        """Rebuilds the blocks as a FAR state dict has them. Returns it at this model's image size and classes."""
        head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        state = {**head, **state}  # timm drops a classifier of another size
        config = infer_far(state, "checkpoint_path")
        like, model = self.pos_embed, build_on_meta(config, "checkpoint_path")  # whose weights the state dict has
        if (model.embed_dim, len(model.blocks)) != (self.embed_dim, len(self.blocks)):
            raise FarError(f"checkpoint_path: holds a {config.base_model}; create the far_deit model of that scale")
        for block, new in zip(self.blocks, model.blocks, strict=True):
            block.mlp.resize(new.mlp.sizes)
            block.attn, block.mlp = new.attn.to_empty(device=like.device).to(like.dtype), block.mlp.to(like)
        self.train(self.training)
        set_input_size(self, config.img_size if "img_size" in adopts else self.patch_embed.img_size)
        if "num_classes" in adopts:
            self.reset_classifier(config.num_classes)
        elif config.num_classes != self.num_classes:
            log.warning(
                "checkpoint_path: knows %d classes, not %d: the classifier is fresh",
                config.num_classes,
                self.num_classes,
            )
            state = {name: value for name, value in state.items() if not name.startswith("head.")} | head
        self.pretrained_cfg = self.default_cfg = data_config(self)
        return resize_positions(state, self, "checkpoint_path")


def _create(name: str, width: int, pretrained: bool, **kwargs) -> VisionTransformer:
    shape = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // 64}
    return build_model_with_cfg(
        FarDeiT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        adopts={"num_classes", "img_size"} - kwargs.keys(),
        **{**shape, **kwargs},
    )


_DATA = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({f"far_deit_{scale}_patch16_224": _DATA for scale in ("tiny", "small", "base")})


@register_model
def far_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """FAR of DeiT-Tiny; `checkpoint_path` is a FAR checkpoint."""
    return _create("far_deit_tiny_patch16_224", 192, pretrained, **kwargs)


@register_model
def far_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """FAR of DeiT-Small."""
    return _create("far_deit_small_patch16_224", 384, pretrained, **kwargs)


@register_model
def far_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """FAR of DeiT-Base."""
    return _create("far_deit_base_patch16_224", 768, pretrained, **kwargs)
