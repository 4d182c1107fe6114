"""What the flags ask for, a small value a concern: a field is the flag of its name, which `arguments.pick` fills in."""

from dataclasses import dataclass, replace
from pathlib import Path

from datasets.loading import DataConfig
from engine.stages import Optim
from engine.train import Settings, check_optimizer
from models.weights import ModelName
from utils.distributed import Context
from utils.errors import FarError
from utils.files import expanded
from utils.run_folder import RunConfig


@dataclass(frozen=True)
class ModelConfig(ModelName):
    """Which model, at which size, and what regularizes it while it trains."""

    base_weight: Path | None = None
    input_size: int | None = None
    rep_by: str = "multi-lstm"
    drop: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True)
class FarSource:
    """A FAR checkpoint: the file that `flag` names, else the first that a table of `published` has for the scale."""

    flag: str
    path: Path | None
    published: tuple[dict[str, str], ...]

    def find(self, model: ModelName) -> Path:
        scale = model.name.removeprefix("DeiT-")
        found = self.path or next(filter(None, (table.get(scale) for table in self.published)), None)
        if not found:
            raise FarError(
                f"{self.flag}: none given and PRETRAINED_PATH[{scale!r}] in main.py is empty; name a FAR checkpoint"
            )
        return expanded(found)


@dataclass(frozen=True)
class Rates:
    """One family of optimiser flags, `flag` being its --opt; the rates are for a global batch of 512."""

    asked: Optim
    flag: str
    unscale_lr: bool

    def optim(self, context: Context) -> Optim:
        """Rates times the global batch / 512 (linear scaling, as in DeiT). Raises FarError where --opt cannot serve."""
        asked = self.asked
        scale = 1.0 if self.unscale_lr else asked.batch_size * context.world * asked.accum_steps / 512
        optim = replace(asked, lr=asked.lr * scale, warmup_lr=asked.warmup_lr * scale, min_lr=asked.min_lr * scale)
        if asked.decay_rate is not None and asked.sched not in ("step", "poly"):
            flag = self.flag.replace("opt", "decay-rate")
            raise FarError(f"{flag}: schedule {asked.sched} has none; leave it out, or take step or poly")
        check_optimizer(optim, self.flag, context.device)
        return optim


@dataclass(frozen=True)
class Command:
    """What main.py and prune.py both ask for."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    settings: Settings
    rates: Rates
    far: FarSource
