"""Which blocks to replace (--replace auto): what each replacement costs the teacher's function, and the cheapest first.

The student's replacements were trained on the teacher's own inputs, so that each is right on its own. A hybrid is the
teacher with the student's blocks in some places.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from engine.distill import FEATURES, TERMS, find_loss
from engine.stages import Stage
from models.features import attention_inputs, attention_weights, embed, kl_divergence
from utils.distributed import Context
from utils.errors import FarError
from utils.records import read_part

RANKING_FILE = "ranking.json"  # in a run's folder: a resumed run reuses it
ASIDE = 512  # images, at most an eighth of the training split, on which blocks are ranked


@dataclass(frozen=True)
class Cost:
    """What a hybrid loses, over images: KL(teacher || hybrid) in nats, and the teacher's answers that stay in %."""

    kl: float
    agreement: float


@dataclass(eq=False)
class Hybrids:
    """Measures hybrids of teacher and student, on one device, on this process's batches of images (B, 3, S, S)."""

    teacher: VisionTransformer
    student: VisionTransformer
    images: Sequence[Tensor]
    context: Context
    autocast: Callable

    def __post_init__(self):
        self.teacher.eval(), self.student.eval()
        self.depth = len(self.teacher.blocks)
        self.known: dict[frozenset[int], Cost] = {}  # by the blocks replaced
        with torch.no_grad(), self.autocast():
            self.teacher_logits = [self.teacher(batch).double() for batch in self.images]

    def _blocks(self, replaced: Iterable[int]) -> list[nn.Module]:
        return [(self.student if i in replaced else self.teacher).blocks[i] for i in range(self.depth)]

    @torch.no_grad()
    def toggle_costs(self, replaced: Iterable[int], blocks: Sequence[int], desc: str = "ranking") -> dict[int, Cost]:
        """By each of `blocks`: the cost of the hybrid with `replaced` blocks, but that one on the other side."""
        replaced, model = frozenset(replaced), self.teacher
        hidden = None if self.context.main else True
        new = [b for b in blocks if replaced ^ {b} not in self.known]
        sums = torch.zeros(len(new), 3, dtype=torch.float64, device=self.context.device)
        batches = list(zip(self.images, self.teacher_logits, strict=True)) if new else []
        for images, theirs in tqdm(batches, desc=desc, unit="batch", leave=False, disable=hidden):
            with self.autocast():
                inputs = [embed(model, images)]
                for block in self._blocks(replaced)[:-1]:
                    inputs.append(block(inputs[-1]))
                for row, b in enumerate(new):
                    x = inputs[b]
                    for block in self._blocks(replaced ^ {b})[b:]:
                        x = block(x)
                    ours = model.forward_head(model.norm(x)).double()
                    kl = kl_divergence(ours, theirs, "sum")
                    same = (ours.argmax(1) == theirs.argmax(1)).sum()
                    sums[row] += torch.tensor([kl, same, len(images)], dtype=torch.float64, device=sums.device)
        rows = self.context.sum(sums).tolist() if new else []
        for b, (kl, same, n) in zip(new, rows, strict=True):
            self.known[replaced ^ {b}] = Cost(max(kl / n, 0.0), 100 * same / n)
        return {b: self.known[replaced ^ {b}] for b in blocks}

    @torch.no_grad()
    def entropy(self) -> dict[int, float]:
        """By block, the entropy of the teacher's attention in nats: mean over images, heads and tokens."""
        sums = torch.zeros(self.depth, 2, dtype=torch.float64, device=self.context.device)
        for images in self.images:
            with self.autocast():
                for i, x in attention_inputs(self.teacher, images, range(self.depth)).items():
                    weights = attention_weights(self.teacher.blocks[i].attn, x)  # (B, H, N, N)
                    entropies = torch.special.entr(weights.double()).sum(-1)
                    sums[i] += torch.stack([entropies.sum(), entropies.new_tensor(entropies.numel())])
        return {i: total / count for i, (total, count) in enumerate(self.context.sum(sums).tolist())}


def alone(hybrids: Hybrids) -> dict[int, float]:
    """KL with that block alone replaced."""
    return {i: cost.kl for i, cost in hybrids.toggle_costs((), range(hybrids.depth)).items()}


def restore(hybrids: Hybrids) -> dict[int, float]:
    """By how much KL falls where all blocks are replaced and that one gets its attention back."""
    every = range(hybrids.depth)
    without = hybrids.toggle_costs(every, every)
    most = max(cost.kl for cost in without.values())
    return {i: most - cost.kl for i, cost in without.items()}


def greedy(hybrids: Hybrids) -> dict[int, float]:
    """KL after each step of taking, by turns, the block that costs least beside those taken."""
    scores: dict[int, float] = {}
    while left := [i for i in range(hybrids.depth) if i not in scores]:
        costs = hybrids.toggle_costs(scores, left, f"ranking {len(scores) + 1}/{hybrids.depth}")
        best = min(left, key=lambda i: costs[i].kl)
        scores[best] = max([costs[best].kl, *scores.values()])  # a step that gains something does not come earlier
    return scores


def spacing(hybrids: Hybrids) -> dict[int, float]:
    """Evenly spread over the depth, whatever is measured: each next block is the farthest from those taken."""
    order: list[int] = []
    while left := [i for i in range(hybrids.depth) if i not in order]:
        ends = (-1, hybrids.depth, *order)
        order.append(max(left, key=lambda i: min(abs(i - end) for end in ends)))
    return {i: float(place) for place, i in enumerate(order)}


# What --rank names: from hybrids to a score by block, the cheapest to replace lowest. Of equals the first stands first.
RANKINGS: dict[str, Callable[[Hybrids], dict[int, float]]] = {
    "alone": alone,
    "restore": restore,
    "greedy": greedy,
    "spacing": spacing,
    "entropy": Hybrids.entropy,
}


@dataclass(frozen=True)
class Ranking:
    """scores: by block. order: the blocks, cheapest first. path: the cost of replacing the first 1, 2, ... of them."""

    rank: str
    scores: dict[int, float]
    order: tuple[int, ...]
    path: tuple[Cost, ...]

    def choose(self, count: int | None, min_agreement: float | None) -> tuple[int, ...]:
        """The first `count` blocks, else as many as keep the agreement. Raises FarError where not even one does."""
        if min_agreement is not None:
            kept = [k for k, cost in enumerate(self.path, start=1) if cost.agreement >= min_agreement]
            if not kept:
                best = max(self.path, key=lambda cost: cost.agreement)
                raise FarError(
                    f"--min-agreement {min_agreement:g}: with {self.path.index(best) + 1} of {len(self.order)} blocks "
                    f"replaced {best.agreement:.2f} % stay, the most; ask for that, in a run of --mode block-distill "
                    "from this one's replacements (--attn-weight), or train them for longer"
                )
            count = kept[-1]
        return tuple(sorted(self.order[:count]))


def rank_blocks(name: str, hybrids: Hybrids) -> Ranking:
    """Ranks all blocks, and measures what the first so many of them cost together."""
    scores = RANKINGS[name](hybrids)
    order = tuple(sorted(scores, key=scores.get))
    path = [hybrids.toggle_costs(order[:k], [i], "costs")[i] for k, i in enumerate(order)]
    return Ranking(name, scores, order, tuple(path))


def read_ranking(path: Path, depth: int) -> Ranking:
    """The ranking of so many blocks that a run keeps, as {"ranking": its fields}. Raises FarError on anything else."""

    def build(part: dict) -> Ranking:
        scores = {int(block): float(score) for block, score in part["scores"].items()}
        costs = tuple(Cost(float(cost["kl"]), float(cost["agreement"])) for cost in part["path"])
        order = tuple(part["order"])
        if not (sorted(order) == sorted(scores) == list(range(depth)) and len(costs) == depth):
            raise ValueError("of another number of blocks")
        return Ranking(part["rank"], scores, order, costs)

    return read_part(path, "ranking", build)


def terms_of_blocks(loss: str) -> dict[str, float]:
    """The terms of a loss, by name, that compare blocks: by the logits, blocks would depend on one another.

    Raises FarError where there is no such term.
    """
    terms = {name: weight for name, weight in find_loss(loss).terms.items() if TERMS[name].reads <= FEATURES}
    if not terms:
        where = f"--train-loss {loss}: compares no block with its teacher's"
        raise FarError(f"{where}, as --replace auto needs it; add similarity")
    return terms


def block_by_block(stage: Stage) -> Stage:
    """The stage on the terms of its loss that compare blocks."""
    terms = terms_of_blocks(stage.loss).items()
    text = "+".join(name if weight == 1 else f"{weight:g}*{name}" for name, weight in terms)
    return replace(stage, loss=text, target=find_loss(stage.loss).compares or stage.target, select="last")
