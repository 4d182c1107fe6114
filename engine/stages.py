"""A stage of training is a value: what is swapped, what trains, on which loss, with which optimiser."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from timm.models.vision_transformer import VisionTransformer
from torch import nn


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule of a stage. Rates are final (already scaled); epochs and warm-up in epochs."""

    epochs: int
    batch_size: int  # a process
    lr: float
    warmup_epochs: float = 5
    warmup_lr: float = 1e-5
    min_lr: float = 1e-6
    sched: str = "cosine"
    opt: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    clip_grad: float | None = None
    accum_steps: int = 1


@dataclass(frozen=True)
class Stage:
    """`swapped`: blocks replaced when the stage begins; `blocks`: those it trains; `parts`: a key of PARTS.

    `loss`: a key of engine.distill.LOSSES; `target`: what its similarity compares, `z` or `output`;
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


class Parts(NamedTuple):
    """Which modules train; `behind`: some lie behind the last block, where only a loss on the logits reaches them."""

    pick: Callable[[VisionTransformer, Iterable[int]], list[nn.Module]]
    behind: bool = False


def _of_blocks(pick: Callable[[nn.Module], Iterable[nn.Module]]):
    return lambda model, blocks: [part for i in blocks for part in pick(model.blocks[i])]


PARTS: dict[str, Parts] = {
    "mixing": Parts(_of_blocks(lambda block: block.attn.mixing_parts())),
    "block": Parts(_of_blocks(lambda block: [block])),
    "FC": Parts(_of_blocks(lambda block: [block.mlp])),
    "FC+head": Parts(lambda model, blocks: [*(model.blocks[i].mlp for i in blocks), model.head], behind=True),
    "head": Parts(lambda model, blocks: [model.head], behind=True),
    "full": Parts(lambda model, blocks: [model], behind=True),
}


def select_trainable(model: VisionTransformer, stage: Stage) -> int:
    """Freezes everything but the stage's parts; returns how many parameters train."""
    model.requires_grad_(False)
    for part in PARTS[stage.parts].pick(model, stage.blocks):
        part.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def steps(blocks: tuple[int, ...], mode: str, step: int) -> list[tuple[int, ...]]:
    """`parallel`: all at once; `sequential`: `step` blocks at a time, front to back."""
    if mode == "parallel":
        return [blocks]
    return [blocks[i : i + step] for i in range(0, len(blocks), step)]


def distillation(
    blocks: tuple[int, ...],
    mode: str,
    step: int,
    attn: Optim | None,
    attn_loss: str,
    block: Optim,
    block_loss: str,
    block_parts: str,
    head: Optim | None,
    all_swapped: bool,
) -> list[Stage]:
    """The plan of section 3 of the paper's method: attention level, block level, then the classifier.

    Args:
        attn: None skips the attention stage (`--skip-train-attn`).
        head: None leaves the classifier stage out.
        all_swapped: start with every block replaced (weights were given), not step by step.
    """
    parts = steps(blocks, mode, step)
    plan: list[Stage] = []

    def add(kind: str, optim: Optim, which: str, loss: str, target: str, full: bool) -> None:
        for k, group in enumerate(parts):
            swapped = blocks if full else tuple(b for g in parts[: k + 1] for b in g)
            name = kind if len(parts) == 1 else f"{kind} {k + 1}/{len(parts)}"
            plan.append(Stage(name, swapped, group, which, loss, target, optim))

    if attn is not None:
        add("attn", attn, "mixing", attn_loss, "z", all_swapped)
    add("block", block, block_parts, block_loss, "output", all_swapped or attn is not None)
    if head is not None:
        plan.append(Stage("head", blocks, blocks, "head", "classification", "output", head))
    return plan
