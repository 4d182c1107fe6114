"""The one training loop: a list of stages, epoch by epoch, resumable at any optimiser step."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.loading import Data, Loader, naming_dead_workers
from engine.choosing import settle
from engine.compiling import compiled
from engine.distill import find_loss
from engine.evaluate import evaluate
from engine.resume import check, load_optimizer, load_scaler, require
from engine.stages import Stage, select_trainable
from models.replace import FarConfig, pack, replacements, swap_attention
from utils import checkpoint, signals
from utils.configs import Optim, Settings
from utils.distributed import Context
from utils.errors import FarError, first_line
from utils.run_folder import RunFolder
from utils.seeding import seed_all

DECAY_RATE = 0.1
FUSED = ("adam", "adamw")  # torch's, whose step over all weights is one operation: a quarter of the time on a CPU


@dataclass
class Position:
    """Where a run stands, all zero at first. `sums` are the epoch's running totals.

    `best`, `best_loss`: evaluation top-1 and loss of the stage's best weights.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


def make_optimizer(model: nn.Module, optim: Optim, updates: int):
    """timm's optimiser and per-update schedule for the parameters that train; biases and norms do not decay."""
    own = {"eps": optim.opt_eps, "betas": optim.opt_betas}
    kwargs = {name: value for name, value in own.items() if value is not None}
    kwargs |= {"fused": True} if optim.opt in FUSED else {}
    kwargs |= {"momentum": optim.momentum} if optim.opt in ("sgd", "momentum", "rmsprop") else {}
    plain = optim.opt == "sgd" and not optim.momentum  # timm's sgd is Nesterov's, which needs momentum
    name = "momentum" if plain else optim.opt
    try:
        optimizer = create_optimizer_v2(model, opt=name, lr=optim.lr, weight_decay=optim.weight_decay, **kwargs)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives")
    except Exception as error:  # noqa: BLE001  (each of timm's optimisers fails in its own way, for want of a package)
        where = f"--{optim.family}opt {optim.opt}: timm cannot make this optimiser here ({first_line(error)})"
        raise FarError(f"{where}; try adamw, sgd or lamb") from error
    scheduler, _ = create_scheduler_v2(
        optimizer,
        optim.sched,
        num_epochs=optim.epochs,
        decay_epochs=max(1, optim.epochs // 3),
        decay_rate=DECAY_RATE if optim.decay_rate is None else optim.decay_rate,
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=min(optim.warmup_epochs, optim.epochs),
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return optimizer, scheduler


class Turn(NamedTuple):
    """What a step of an epoch does besides adding its batch's gradient."""

    step: int
    group: int  # batches added up for its update; the last update of an epoch may have fewer
    updates: bool  # the weights, as the last step of its group
    looks: bool  # at the losses since the last look


def turns(start: int, total: int, accum: int, look_every: int) -> Iterator[Turn]:
    """The steps `start` to `total` of an epoch; its last one always looks and updates."""
    for step in range(start, total):
        last, group = step + 1 == total, min(accum, total - step // accum * accum)
        yield Turn(step, group, last or (step + 1) % accum == 0, last or (step + 1) % look_every == 0)


OVER = "images of "  # before a part's name: over how many images it was summed up, where that is not all


def means(sums: dict[str, float]) -> dict[str, float]:
    """An epoch's parts, from their totals."""
    parts = (name for name in sums if name != "images" and not name.startswith(OVER))
    return {name: sums[name] / sums.get(OVER + name, sums["images"]) for name in parts}


def most_held(device: torch.device) -> int:
    """The most bytes held so far: by the device's tensors on CUDA, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not told there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Trainer:
    """Runs stages on one model."""

    model: VisionTransformer  # the student; blocks are swapped in it as the stages say
    config: FarConfig  # stored with every checkpoint
    stages: list[Stage]
    make_task: Callable[
        [Stage, nn.Module], nn.Module
    ]  # with the criterion; its forward(images, targets, looked at: with curves): (loss, parts)
    data: Data
    run: RunFolder
    context: Context
    settings: Settings
    resumed: dict[str, Any] | None = None  # the content of last.pth

    def __post_init__(self):
        self.source = f"--resume {self.run.path / 'last.pth'}"
        self.at = Position(**self._resumed_position()) if self.resumed else Position()
        self.trace: list[dict[str, float]] = []  # the process's own losses step by step, not yet written
        if not self.context.main:  # a stopped epoch's totals are stored once, for all processes
            self.at.sums = dict.fromkeys(self.at.sums, 0.0)
        self.handed: tuple[int, dict[str, float]] | None = None  # (batch size, evaluation) of what best.pth holds
        device = self.context.device
        self.autocast = self.settings.autocast(device)
        self.mixup = self.settings.mixer(self.data.num_classes)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.precision(device) == "fp16")
        # The CPU pays nothing to look at a loss; on CUDA each look waits for the device, so it looks every 20 steps.
        self.look_every = 1 if device.type == "cpu" else 20

    def _resumed_position(self) -> dict[str, Any]:
        def batches(stage: Stage) -> int:
            return len(self.data.train_loader(stage.optim.batch_size))

        return check(self.resumed, self.config, self.stages, batches, self.source)

    def fit(self) -> None:
        """Trains every stage; the model then has the weights handed on. Raises signals.Stopped, FarError."""
        device = self.context.device
        if device.type == "cuda":
            self._say(f"{torch.cuda.get_device_name(device)}: {self.settings.products(device)}")
        self._place(self.stages[min(self.at.stage, len(self.stages) - 1)])
        with signals.deferred() as self.request:
            while self.at.stage < len(self.stages):
                self._stage(self.stages[self.at.stage])

    def _place(self, stage: Stage) -> None:
        self.model.to(self.context.device)
        settle(self.model, self.settings.lstm_backend, stage.optim.batch_size, self.context, self.run)

    def _stage(self, stage: Stage) -> None:
        loader, val = self.data.train_loader(stage.optim.batch_size), self.data.val_loader(stage.optim.batch_size)
        task = self._prepare(stage, len(loader))
        with compiled(task) if self.settings.compile else contextlib.nullcontext():
            self._epochs(stage, task, loader, val)
        self._hand_on()

    def _epochs(self, stage: Stage, task: nn.Module, loader: Loader, val: Loader) -> None:
        if self.at.epoch == 0 and self.at.step == 0:
            self._save_last()  # before best.pth changes: a kill in between must find weights of one stage
            same, known = self.handed or (0, {})  # of the stage before, whose weights this one starts from
            self._report(stage, {}, known if same == stage.optim.batch_size else self._evaluate(stage, val), 0.0, 0)
        while self.at.epoch < stage.optim.epochs:
            started = time.perf_counter()
            images = self._epoch(task, stage, loader)
            seconds = time.perf_counter() - started
            self.at.step = len(loader)  # where a stop during the evaluation goes on
            result = self._evaluate(stage, val) if self._due(stage, self.settings.eval_every) else {}
            save = self._due(stage, self.settings.save_every)
            train = means(self._totals())
            self.at.epoch, self.at.step, self.at.sums = self.at.epoch + 1, 0, {}
            self._report(stage, train, result, seconds, images * self.context.world)
            if save:
                self._save_last()

    def _due(self, stage: Stage, every: int) -> bool:
        """Whether the epoch that ends here is one of every so many, or the stage's last."""
        return (self.at.epoch + 1) % every == 0 or self.at.epoch + 1 == stage.optim.epochs

    def _prepare(self, stage: Stage, total: int) -> nn.Module:
        """Swaps and freezes as the stage says, and makes its optimizer; `total` steps an epoch. Returns its task."""
        if self.at.stage:
            # The first stage's modules follow from the run's seed; a later stage is reached with other generator states
            # where the run was resumed in between.
            seed_all(self.settings.seed, self.at.stage)
        if set(stage.swapped) - set(replacements(self.model)):
            self.handed = None
        swap_attention(self.model, stage.swapped, self.config.rep_by, self.settings.rep_init)
        self._place(stage)
        count = select_trainable(self.model, stage)
        self._say(
            f"stage {stage.name}: {count:,} parameters of {stage.parts} train on {stage.loss}, "
            f"{stage.optim.epochs} epochs"
        )
        self.updates, self.trace_every = math.ceil(total / stage.optim.accum_steps), math.ceil(total / 50)
        self.optimizer, self.scheduler = make_optimizer(self.model, stage.optim, self.updates)
        decay = self.settings.model_ema
        self.ema = None if decay is None else ModelEmaV3(self.model, decay, use_warmup=True)
        if self.resumed:
            load_optimizer(self.optimizer, self.resumed["optimizer"], self.source)
            load_scaler(self.scaler, self.resumed["scaler"], self.source)
            if self.ema:
                require("ema" in self.resumed, self.source, "holds no averaged weights (--model-ema)")
                checkpoint.load_into(self.ema.module, self.resumed["ema"], self.source)
            self.resumed = None
        task = self.make_task(stage, self.settings.criterion()).to(self.context.device)
        if self.context.world > 1:
            ids = [self.context.device.index] if self.context.device.type == "cuda" else None
            # Batches that only add up (no_sync) see another graph than those that exchange gradients.
            static = stage.optim.accum_steps == 1
            kwargs = {"forward_sync_buffers": False, "gradient_as_bucket_view": True, "static_graph": static}
            task = DistributedDataParallel(task, device_ids=ids, **kwargs)
        return task

    def _epoch(self, task: nn.Module, stage: Stage, loader: Loader) -> int:
        """One pass over the training split from the position's step on; returns the images this process saw."""
        task.train()
        self.data.at(loader, self.at.stage * 10_000 + self.at.epoch, self.at.step)
        with (
            naming_dead_workers(loader.num_workers),
            tqdm(
                total=len(loader),
                initial=self.at.step,
                desc=f"{stage.name} {self.at.epoch + 1}/{stage.optim.epochs}",
                unit="step",
                leave=False,
                disable=not self.context.main,
                mininterval=0.5,
            ) as bar,
        ):
            return self._steps(task, stage, loader, bar)

    def _steps(self, task: nn.Module, stage: Stage, loader: Loader, bar: tqdm) -> int:
        """A look comes before the update: a loss that is not finite must not reach the weights."""
        pending: list[tuple[int, int, dict[str, Tensor]]] = []
        count, started, shown, self.waited = 0, time.perf_counter(), math.nan, 0.0
        plan = turns(self.at.step, len(loader), stage.optim.accum_steps, self.look_every)
        for turn, batch in zip(plan, self._waited_for(loader), strict=True):
            images, targets = self._batch(*batch, turn.step)
            pending.append((turn.step, len(images), self._accumulate(task, images, targets, turn)))
            count += len(images)
            if turn.updates:
                self._set_rate_and_clip(stage.optim, turn.step)
            if turn.looks:
                shown = self._flush(pending, stage)
            if turn.updates:
                self._update(turn.step // stage.optim.accum_steps)
            self._show(bar, shown, count * self.context.world, time.perf_counter() - started)
            if turn.updates and (number := self.context.most(self.request.number)):
                self._flush(pending, stage)  # a loss that is not finite must not be saved
                self.at.step = turn.step + 1
                self._stop(stage, number)
        return count

    def _waited_for(self, loader: Loader) -> Iterator:
        """The batches; adds up the seconds that they kept the loop waiting."""
        batches, asked = iter(loader), time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def _batch(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A batch on the device, mixed where asked; from here on a step's draws follow from its place."""
        device = self.context.device
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        seed_all(self.settings.seed, self.context.rank, self.at.stage, self.at.epoch, step)
        if self.mixup is None:
            return images, targets
        even = len(images) // 2 * 2  # Mixup pairs images
        return self.mixup(images[:even], targets[:even])

    def _accumulate(self, task: nn.Module, images: Tensor, targets: Tensor, turn: Turn) -> dict[str, Tensor]:
        """Adds the batch's gradient; processes exchange theirs once an update. Returns the loss and its parts."""
        with contextlib.nullcontext() if turn.updates or self.context.world == 1 else task.no_sync():
            with self.autocast():
                loss, parts = task(images, targets, turn.step % self.trace_every == 0)
            self.scaler.scale(loss / turn.group).backward()
        return {"loss": loss.detach(), **parts}

    def _set_rate_and_clip(self, optim: Optim, step: int) -> None:
        self.scheduler.step_update(self.at.epoch * self.updates + step // optim.accum_steps)
        if optim.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad([p for p in self.model.parameters() if p.requires_grad], optim.clip_grad)

    def _update(self, number: int) -> None:
        """number: of the update in its epoch."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, self.at.epoch * self.updates + number + 1)

    @property
    def evaluated(self) -> VisionTransformer:
        """What is evaluated and handed on: the averaged weights where there are some, else the trained ones."""
        return self.ema.module if self.ema else self.model

    def _show(self, bar: tqdm, loss: float, images: int, seconds: float) -> None:
        """data: the share of the time that steps waited for images."""
        bar.update()
        bar.set_postfix(
            loss=f"{loss:.4f}",
            lr=f"{self.optimizer.param_groups[0]['lr']:.2e}",
            img_s=f"{images / seconds:.0f}",
            data=f"{self.waited / seconds:.0%}",
            refresh=False,
        )

    def _totals(self) -> dict[str, float]:
        """The epoch's sums over all processes; none before its first step."""
        if not self.at.sums:
            return {}
        values = self.context.sum(torch.tensor(list(self.at.sums.values()), dtype=torch.float64)).tolist()
        return dict(zip(self.at.sums, values, strict=True))

    def _evaluate(self, stage: Stage, loader) -> dict[str, float]:
        """`evaluate`, which a signal interrupts: the epoch's steps are saved, its evaluation comes again."""

        def look() -> None:
            if number := self.context.most(self.request.number):
                self._stop(stage, number)

        return evaluate(self.evaluated, loader, self.context, self.autocast, look)

    def _stop(self, stage: Stage, number: int) -> None:
        self._save_last()
        where = (
            f"stage {stage.name}, epoch {self.at.epoch + 1}, step {self.at.step}: {self.run.path / 'last.pth'} holds it"
        )
        message = f"stopped at {where}; the same command with --resume goes on" if self.context.main else ""
        raise signals.Stopped(number, message, saved=True)

    def _flush(self, pending: list, stage: Stage) -> float:
        """Adds the collected losses to the epoch's sums; stops on the first that is not finite."""
        value = math.nan
        found = [part.float() for _, _, parts in pending for part in parts.values()]
        losses = iter(torch.stack(found).tolist() if found else [])  # in one transfer
        always = {"loss", *find_loss(stage.loss).terms}
        for step, size, parts in pending:
            values = dict(zip(parts, losses, strict=False))
            value = values["loss"]
            if not math.isfinite(value):
                raise FarError(
                    f"loss is {value} at step {step + 1} of epoch {self.at.epoch + 1}, stage "
                    f"{stage.name}; the last good "
                    f"checkpoint is {self.run.path / 'last.pth'}; lower the rate, set --clip-grad or --amp off"
                )
            curves = [(OVER + name, 1.0) for name in values.keys() - always]
            for name, part in [("images", 1.0), *values.items(), *sorted(curves)]:
                self.at.sums[name] = self.at.sums.get(name, 0.0) + part * size
            if step % self.trace_every == 0:
                self.trace.append({"stage_index": self.at.stage, "epoch": self.at.epoch, "step": step, **values})
        pending.clear()
        return value

    def _save_last(self) -> None:
        sums = self._totals()
        # The log first: a kill in between runs its rows again, which then replace themselves.
        self.run.append("steps.jsonl", self.trace)
        self.run.save(
            "last.pth",
            {
                **pack(self.model, self.config),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": {**vars(self.at), "sums": sums},
                **({"ema": self.ema.module.state_dict()} if self.ema else {}),
            },
        )
        self.trace = []
        self.context.barrier()

    def _report(self, stage: Stage, train: dict, val: dict, seconds: float, images: int) -> None:
        """Keeps the stage's best weights and logs the epoch; one that was not evaluated has no `val`."""
        last = (stage.select or self.settings.select) == "last"
        # Of two of one top-1 the lower loss.
        if val and (last or (val["acc1"], -val["loss"]) > (self.at.best, -self.at.best_loss)):
            self.at.best, self.at.best_loss = val["acc1"], val["loss"]
            self.run.save("best.pth", pack(self.evaluated, self.config))
            self.handed = stage.optim.batch_size, val
        row = {
            "stage": stage.name,
            "stage_index": self.at.stage,
            "epoch": self.at.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train": train,
            "val": val,
            "seconds": round(seconds, 3),
            "images_per_s": round(images / seconds, 1) if seconds else 0.0,
            "data_seconds": round(self.waited, 3) if seconds else 0.0,
            "peak_memory_mb": round(most_held(self.context.device) / 1e6),
        }
        self.run.append("log.jsonl", [row])
        losses = " ".join(f"{name} {value:.4f}" for name, value in train.items())
        when = f"epoch {self.at.epoch}/{stage.optim.epochs}" if train else "before training"
        found = f"top-1 {val['acc1']:.2f} top-5 {val['acc5']:.2f} val loss {val['loss']:.4f} " if val else ""
        self._say(f"  {when}: {found}{losses}".rstrip())

    def _hand_on(self) -> None:
        """The next stage starts from this one's selected weights."""
        state = checkpoint.load(self.run.path / "best.pth", "--output-dir")["model"]
        checkpoint.load_into(self.model, state, f"--output-dir {self.run.path / 'best.pth'}")
        self.at = Position(stage=self.at.stage + 1)
        if self.at.stage == len(self.stages):
            self._save_last()

    def _say(self, text: str) -> None:
        if self.context.main:
            tqdm.write(text)
