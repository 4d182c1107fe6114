"""A stage of training is a value: what is swapped, what trains, on which loss, with which optimiser."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.vit import classifiers
from utils.configs import Optim, Plan


@dataclass(frozen=True)
class Stage:
    """`swapped`: blocks replaced when the stage begins; `blocks`: those it trains; `parts`: a key of PARTS.

    `loss`: what engine.distill.find_loss finds; `target`: what its similarity compares, `z` or `output`;
    `select`: the weights it hands on, `best` or `last`; empty is what the settings say.
    """

    name: str
    swapped: tuple[int, ...]
    blocks: tuple[int, ...]
    parts: str
    loss: str
    target: str
    optim: Optim
    select: str = ""


# (model, stage, criterion) to a module whose forward(images, targets) gives the loss and its parts.
MakeTask = Callable[[nn.Module, Stage, nn.Module], nn.Module]


class Trainable(NamedTuple):
    """Which modules train; `behind`: some lie behind the last block, where only a loss on the logits reaches them."""

    pick: Callable[[VisionTransformer, Iterable[int]], list[nn.Module]]
    behind: bool = False


PARTS: dict[str, Trainable] = {
    "mixing": Trainable(lambda model, blocks: [part for i in blocks for part in model.blocks[i].attn.mixing_parts()]),
    "block": Trainable(lambda model, blocks: [model.blocks[i] for i in blocks]),
    "FC": Trainable(lambda model, blocks: [model.blocks[i].mlp for i in blocks]),
    "FC+head": Trainable(
        lambda model, blocks: [*(model.blocks[i].mlp for i in blocks), *classifiers(model)], behind=True
    ),
    "head": Trainable(lambda model, blocks: classifiers(model), behind=True),
    "full": Trainable(lambda model, blocks: [model], behind=True),
}


def select_trainable(model: VisionTransformer, stage: Stage) -> int:
    """Freezes everything but the stage's parts; returns how many parameters train."""
    model.requires_grad_(False)
    for part in PARTS[stage.parts].pick(model, stage.blocks):
        part.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def distillation(blocks: tuple[int, ...], plan: Plan, attn: Optim | None, block: Optim) -> list[Stage]:
    """The stages of section 3 of the paper's method: attention level, block level, then the classifier.

    Args:
        blocks: those to replace, all at once or `plan.step` at a time, front to back. With the plan's weights all are
            replaced from the start, else step by step.
        attn: of the attention stage; None skips it.
        block: of the block stage, and of the classifier's.
    """
    step = len(blocks) if plan.train_mode == "parallel" else plan.step
    groups = [blocks[i : i + step] for i in range(0, len(blocks), step)]
    stages: list[Stage] = []

    def add(kind: str, optim: Optim, parts: str, loss: str, target: str, all_swapped: bool) -> None:
        for k, group in enumerate(groups):
            swapped = blocks if all_swapped else tuple(b for g in groups[: k + 1] for b in g)
            name = kind if len(groups) == 1 else f"{kind} {k + 1}/{len(groups)}"
            stages.append(Stage(name, swapped, group, parts, loss, target, optim))

    given = plan.attn_weight is not None
    if attn is not None:
        add("attn", attn, "mixing", plan.train_loss, "z", given)
    add("block", block, plan.block_ft_mode, plan.block_ft_train_loss, "output", given or attn is not None)
    if plan.finetune_head:
        stages.append(Stage("head", blocks, blocks, "head", "classification", "output", block))
    return stages
