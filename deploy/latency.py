"""What hidden units cost in time: a measured table, by which prune.py chooses units, and the check of the pruned model.

A cell is computed in vectors of the CPU's width, so time is a staircase over a place's units: only full vectors are in
the table.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from deploy.fuse import fuse
from deploy.timing import lower_quartiles
from models.deit import create_teacher
from models.kernels import cpu
from models.replace import FarConfig, build, describe, pruned_to, replacements, set_backend
from utils.arguments import Latency
from utils.configs import RunConfig
from utils.errors import FarError
from utils.records import read_part
from utils.seeding import seeded

FILE = "latency.json"  # in a run's folder: a resumed run chooses by the same table
SECONDS = 5.0  # of measuring


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of whole models, fused on a CPU: of the teacher, and with the same number of units in every place.

    ms: by that number, ascending, never less than before; the first is 1.
    """

    batch: int
    threads: int
    teacher_ms: float
    ms: dict[int, float]
    precision: str = "float32"

    def ms_at(self, units: int) -> float:
        """On the staircase: as long as the next number in the table takes."""
        return next(ms for level, ms in self.ms.items() if level >= units)

    def predict(self, sizes: Iterable[int]) -> float:
        """A model with so many units by place: each place has its share of the time."""
        return mean(map(self.ms_at, sizes))

    def target_ms(self, target: Latency) -> float:
        return target.amount / 100 * self.teacher_ms if target.percent else target.amount


def load_or_measure(
    run: RunConfig, model: VisionTransformer, config: FarConfig, batch: int, mlp: float | None, precision: str
) -> LatencyTable:
    """The table of a run that goes on, else a new one. mlp: the share of MLP units that will stay."""
    if run.resume and run.output_dir and (path := run.output_dir / FILE).exists():
        return read_table(path, max(places(model)))
    return measure(model, config, batch, mlp, precision)


def read_table(path: Path, most: int) -> LatencyTable:
    """What a run wrote of a model with at most so many units in a place. Raises FarError on anything else."""

    def build(part: dict) -> LatencyTable:
        table = LatencyTable(**{**part, "ms": {int(units): float(ms) for units, ms in part["ms"].items()}})
        if not {1, most} <= table.ms.keys():
            raise ValueError("of a model with other numbers of units")
        return table

    return read_part(path, "table", build)


def measure(
    model: VisionTransformer, config: FarConfig, batch: int, mlp: float | None, precision: str = "float32"
) -> LatencyTable:
    """Times models of the shape of this one, random weights, with the numbers of units at which vectors are full."""
    shape, parts = pruned_to(describe(model, config), 1, mlp or 1), replacements(model)
    most = max(places(model))
    step = cpu.load(cpu.TUNED).vector_width() if cpu.available() else 8
    levels = [1, *range(step, most, step), most]
    sizes = {u: {str(i): _filled(part.sizes, u) for i, part in parts.items()} for u in levels}
    with seeded(0):
        models = {f"{u}": build(replace(shape, units=units)).eval() for u, units in sizes.items()}
        models["teacher"] = create_teacher(config.base_model, config.num_classes, config.img_size).eval()
        times = in_engine(models, SECONDS, batch, precision)
    longest = accumulate((times[f"{u}"] for u in levels), max)  # noise must not make fewer units slower
    ms = dict(zip(levels, longest, strict=True))
    return LatencyTable(batch, torch.get_num_threads(), times["teacher"], ms, precision)


def check_target(model: VisionTransformer, config: FarConfig, table: LatencyTable, target: Latency) -> dict[str, Any]:
    """Measures the shrunk model, and the teacher in turns with it, beside what was predicted."""
    copied = copy.deepcopy(model).cpu().eval()
    set_backend(copied, "auto")
    with seeded(0):
        teacher = create_teacher(config.base_model, config.num_classes, config.img_size).eval()
        times = in_engine({"model": copied, "teacher": teacher}, SECONDS, table.batch, table.precision)
    predicted = table.predict(places(model))
    timing = {"target_ms": table.target_ms(target), "predicted_ms": predicted, "measured_ms": times["model"]}
    timing |= {"measured_teacher_ms": times["teacher"], "measured_threads": torch.get_num_threads()}
    return {**timing, "table": asdict(table)}


def places(model: VisionTransformer) -> list[int]:
    """Hidden units of each block's heads and directions."""
    return [len(norms) for part in replacements(model).values() for norms in part.unit_norms().values()]


def _filled(sizes: Any, units: int) -> Any:
    """Nested like sizes, so many units in each place."""
    return units if isinstance(sizes, int) else [_filled(size, units) for size in sizes]


@torch.inference_mode()
def in_engine(
    models: Mapping[Any, VisionTransformer], seconds: float = 1.0, batch: int = 1, precision: str = "float32"
) -> dict[Any, float]:
    """Milliseconds by name of models fused on the CPU, which take turns for `seconds`."""
    images = torch.randn(batch, 3, *next(iter(models.values())).patch_embed.img_size)
    try:
        calls = {name: partial(fuse(model, precision), images) for name, model in models.items()}
    except FarError as error:
        raise FarError(str(error).replace("--fuse", "--precision")) from error
    return lower_quartiles(calls, seconds)


def describe_timing(timing: dict[str, Any]) -> str:
    """What `check_target` measured, in one line."""
    over = timing["measured_ms"] / timing["target_ms"] - 1
    table, share = timing["table"], timing["measured_ms"] / timing["measured_teacher_ms"]
    other = f" for {table['threads']} threads" * (table["threads"] != timing["measured_threads"])  # a resumed run
    return (
        f"fused, {table['precision']}, batch {table['batch']}, {timing['measured_threads']} threads: "
        f"{timing['measured_ms']:.2f} ms, target {timing['target_ms']:.2f} ms ({timing['predicted_ms']:.2f} "
        f"predicted{other}), the teacher {timing['measured_teacher_ms']:.2f}: {share:.0%}"
        + (f"; the target is missed by {over:.0%}" if over > 0.005 else "")
    )
