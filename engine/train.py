"""The one training loop: a list of stages, epoch by epoch, resumable at any optimiser step."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.loading import Data, Loader, naming_dead_workers
from engine.compiling import compiled
from engine.evaluate import ACCURACY, evaluate
from engine.fidelity import fidelity
from engine.resume import Position, fingerprint, read_position
from engine.stages import MakeTask, Stage, select_trainable
from models.choosing import choose_kernels
from models.replace import FarConfig, pack, replacements, swap_attention
from utils import checkpoint, signals
from utils.configs import Optim, Settings
from utils.distributed import Context, say
from utils.errors import FarError, first_line
from utils.run_folder import RunFolder
from utils.seeding import seed_all

DECAY_RATE = 0.1
FUSED = ("adam", "adamw")  # torch's, whose step over all weights is one operation: a quarter of the time on a CPU


def make_optimizer(model: nn.Module, optim: Optim, updates: int):
    """timm's optimiser and per-update schedule for the parameters that train; biases and norms do not decay.

    Raises FarError where timm cannot make the optimiser, or it needs more than gradients.
    """
    kwargs = {"eps": optim.opt_eps, "betas": optim.opt_betas}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
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


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by the device's tensors on CUDA, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not told there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(eq=False)
class Trainer:
    """Runs stages, in order, on one model, from the content of last.pth on where the run is `resumed`."""

    model: VisionTransformer  # the student; its blocks are swapped as the stages say
    config: FarConfig  # stored with every checkpoint
    stages: list[Stage]
    make_task: MakeTask
    data: Data
    run: RunFolder  # that it writes to
    context: Context
    settings: Settings  # what all stages share
    resumed: dict[str, Any] | None = None
    teacher: VisionTransformer | None = None  # what the student is compared with after the last epoch, if anything

    def __post_init__(self):
        device, last = self.context.device, self.run.path / "last.pth"
        self.fingerprint = fingerprint(self.config, self.stages, self.context.world)
        self.position = read_position(self.resumed, self.fingerprint, last) if self.resumed else Position()
        if not self.context.main:  # a stopped epoch's totals are stored once, for all processes
            self.position.sums = dict.fromkeys(self.position.sums, 0.0)
        self.curves: list[dict[str, float]] = []  # this process's losses by step, not yet written
        self.handed_on: tuple[int, dict[str, Any]] = 0, {}  # batch size and evaluation of what best.pth holds, if known
        self.autocast = self.settings.autocast(device)
        self.mixup = self.settings.mixer(self.data.num_classes)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.precision(device) == "fp16")

    def fit(self) -> dict[str, Any]:
        """Trains every stage; the model then has the weights handed on. Raises signals.Stopped, FarError.

        Returns `evaluate` of these weights, or `fidelity` where there is a teacher.
        """
        device = self.context.device
        if device.type == "cuda":
            say(self.context, f"{torch.cuda.get_device_name(device)}: {self.settings.products(device)}")
        self.place(self.stages[min(self.position.stage, len(self.stages) - 1)])
        with signals.deferred() as self.request:
            while self.position.stage < len(self.stages):
                self.train_stage(self.stages[self.position.stage])
            if signal_number := self.context.most(self.request.number):
                self.leave("after its last epoch", signal_number)  # all is saved but the report
        last = self.stages[-1].optim.batch_size
        batch_size, val = self.handed_on
        if batch_size == last and (self.teacher is None or "agreement" in val):
            return val
        return self.evaluate(self.model, self.data.val_loader(last), compare=True)  # an epoch before it was the best

    def train_stage(self, stage: Stage) -> None:
        """The stage's epochs from the position on; the model then has the weights that it hands on."""
        optim, settings, position = stage.optim, self.settings, self.position
        loader, val_loader = self.data.train_loader(optim.batch_size), self.data.val_loader(optim.batch_size)
        task = self.prepare(stage, len(loader))

        def stop_if_asked() -> None:
            if signal_number := self.context.most(self.request.number):
                self.stop(stage, signal_number)  # the epoch's steps are saved, its evaluation comes again

        with compiled(task) if settings.compile else contextlib.nullcontext():
            if position.epoch == 0 and position.step == 0:
                self.save_last()  # before best.pth changes: a kill in between must find weights of one stage
                batch_size, val = self.handed_on
                if batch_size != optim.batch_size:  # else the stage before has evaluated it, in the same batches
                    val = self.evaluate(self.evaluated, val_loader, check=stop_if_asked)
                self.report(stage, {}, val)
            while position.epoch < optim.epochs:
                started = time.perf_counter()
                images, waited = self.train_one_epoch(task, stage, loader)
                seconds = time.perf_counter() - started
                position.step = len(loader)  # where a stop during the evaluation goes on
                number, last = position.epoch + 1, position.epoch + 1 == optim.epochs
                val = {}
                if last or number % settings.eval_every == 0:
                    compare = last and stage is self.stages[-1]
                    val = self.evaluate(self.evaluated, val_loader, compare, stop_if_asked)
                totals = self.totals()
                train = {name: total / totals["images"] for name, total in totals.items() if name != "images"}
                position.epoch, position.step, position.sums = number, 0, {}
                self.report(stage, train, val, seconds, images * self.context.world, waited)
                if last or number % settings.save_every == 0:
                    self.save_last()
        state = checkpoint.load(self.run.path / "best.pth", "--output-dir")["model"]
        checkpoint.load_into(self.model, state, f"--output-dir {self.run.path / 'best.pth'}")
        self.position = Position(stage=position.stage + 1)
        if self.position.stage == len(self.stages):
            self.save_last()

    def place(self, stage: Stage) -> None:
        self.model.to(self.context.device)
        choose_kernels(self.model, self.settings.lstm_backend, stage.optim.batch_size, self.context, self.run)

    def prepare(self, stage: Stage, steps: int) -> nn.Module:
        """Swaps and freezes as the stage says, and makes its optimizer; `steps` an epoch. Returns its task."""
        if self.position.stage:
            # The first stage's modules follow from the run's seed; a later stage is reached with other generator states
            # where the run was resumed in between.
            seed_all(self.settings.seed, self.position.stage)
        if set(stage.swapped) - set(replacements(self.model)):
            self.handed_on = 0, {}
        swap_attention(self.model, stage.swapped, self.config.rep_by, self.settings.rep_init)
        self.place(stage)
        count = select_trainable(self.model, stage)
        trained = f"{count:,} parameters of {stage.parts} train on {stage.loss}"
        say(self.context, f"stage {stage.name}: {trained}, {stage.optim.epochs} epochs")
        self.updates = math.ceil(steps / stage.optim.accum_steps)  # an epoch
        self.optimizer, self.scheduler = make_optimizer(self.model, stage.optim, self.updates)
        decay = self.settings.model_ema
        self.ema = None if decay is None else ModelEmaV3(self.model, decay, use_warmup=True)
        if self.resumed:
            self.optimizer.load_state_dict(self.resumed["optimizer"])
            self.scaler.load_state_dict(self.resumed["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(self.resumed["ema"])
            self.resumed = None
        task = self.make_task(self.model, stage, self.settings.criterion()).to(self.context.device)
        if self.context.world > 1:
            ids = [self.context.device.index] if self.context.device.type == "cuda" else None
            # Batches that only add up (no_sync) see another graph than those that exchange gradients.
            static = stage.optim.accum_steps == 1
            kwargs = {"forward_sync_buffers": False, "gradient_as_bucket_view": True, "static_graph": static}
            task = DistributedDataParallel(task, device_ids=ids, **kwargs)
        return task

    def train_one_epoch(self, task: nn.Module, stage: Stage, loader: Loader) -> tuple[int, float]:
        """One pass over the training split, from the position's step on.

        Returns the images that this process saw, and the seconds that it waited for them. Raises FarError where a loss
        is not finite, before it reaches the weights, and signals.Stopped.
        """
        optim, total, device = stage.optim, len(loader), self.context.device
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        losses: list[tuple[int, int, dict[str, Tensor]]] = []  # (step, images, loss and parts) not yet read
        # To read a loss costs nothing on a CPU; on CUDA it waits for the device, so losses are read every 20 steps.
        read_every, curve_every = (1 if device.type == "cpu" else 20), math.ceil(total / 50)
        count, waited, loss_shown = 0, 0.0, math.nan
        task.train()
        self.data.seek(loader, self.position.stage * 10_000 + self.position.epoch, self.position.step)
        bar = tqdm(
            total=total,
            initial=self.position.step,
            desc=f"{stage.name} {self.position.epoch + 1}/{optim.epochs}",
            unit="step",
            leave=False,
            disable=not self.context.main,
            mininterval=0.5,
        )
        with naming_dead_workers(loader.num_workers), bar:
            started = ended = time.perf_counter()
            for step, (images, targets) in zip(range(self.position.step, total), loader, strict=True):
                waited += time.perf_counter() - ended
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                # From here on all draws follow from the step's place: a resumed run draws the same.
                seed_all(self.settings.seed, self.context.rank, self.position.stage, self.position.epoch, step)
                if self.mixup:
                    even = len(images) // 2 * 2  # Mixup pairs images
                    images, targets = self.mixup(images[:even], targets[:even])

                # The gradients of accum_steps batches, or of an epoch's last few, make one update.
                update = step // optim.accum_steps
                group = min(optim.accum_steps, total - update * optim.accum_steps)
                updates = step + 1 == update * optim.accum_steps + group
                with contextlib.nullcontext() if updates or self.context.world == 1 else task.no_sync():
                    with self.autocast():
                        loss, parts = task(images, targets)
                    self.scaler.scale(loss / group).backward()
                losses.append((step, len(images), {"loss": loss.detach(), **parts}))
                count += len(images)
                if updates:
                    self.scheduler.step_update(self.position.epoch * self.updates + update)
                    if optim.clip_grad is not None:
                        self.scaler.unscale_(self.optimizer)
                        dispatch_clip_grad(trainable, optim.clip_grad)
                if step + 1 == total or (step + 1) % read_every == 0:
                    loss_shown = self.read_losses(losses, stage, curve_every)  # raises before the update
                if updates:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad(set_to_none=True)
                    if self.ema:
                        self.ema.update(self.model, self.position.epoch * self.updates + update + 1)

                seconds = time.perf_counter() - started
                bar.update()
                bar.set_postfix(
                    loss=f"{loss_shown:.4f}",
                    lr=f"{self.optimizer.param_groups[0]['lr']:.2e}",
                    img_s=f"{count * self.context.world / seconds:.0f}",
                    data=f"{waited / seconds:.0%}",
                    refresh=False,
                )
                if updates and (signal_number := self.context.most(self.request.number)):
                    self.read_losses(losses, stage, curve_every)  # a loss that is not finite must not be saved
                    self.position.step = step + 1
                    self.stop(stage, signal_number)
                ended = time.perf_counter()  # what follows is waiting for images; other processes were waited for above
        return count, waited

    def read_losses(self, losses: list, stage: Stage, curve_every: int) -> float:
        """Adds the steps' losses to the epoch's sums and empties the list. Returns the last loss.

        Raises FarError on the first that is not finite.
        """
        value, position = math.nan, self.position
        tensors = [part.float() for _, _, parts in losses for part in parts.values()]
        values = iter(torch.stack(tensors).tolist() if tensors else [])  # in one transfer
        for step, size, parts in losses:
            parts = {name: next(values) for name in parts}
            value = parts["loss"]
            if not math.isfinite(value):
                raise FarError(
                    f"loss is {value} at step {step + 1} of epoch {position.epoch + 1}, stage {stage.name}; the last "
                    f"good checkpoint is {self.run.path / 'last.pth'}; lower the rate, set --clip-grad or --amp off"
                )
            for name, part in [("images", 1.0), *parts.items()]:
                position.sums[name] = position.sums.get(name, 0.0) + part * size
            if step % curve_every == 0:
                self.curves.append({"stage_index": position.stage, "epoch": position.epoch, "step": step, **parts})
        losses.clear()
        return value

    def totals(self) -> dict[str, float]:
        """The epoch's sums over all processes; none before its first step."""
        if not self.position.sums:
            return {}
        values = self.context.sum(torch.tensor(list(self.position.sums.values()), dtype=torch.float64)).tolist()
        return dict(zip(self.position.sums, values, strict=True))

    @property
    def evaluated(self) -> VisionTransformer:
        """What is evaluated and handed on: the averaged weights where there are some, else the trained ones."""
        return self.ema.module if self.ema else self.model

    def evaluate(
        self, model: VisionTransformer, loader: Loader, compare: bool = False, check: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """`evaluate` or, to compare with the teacher where there is one, `fidelity`."""
        if compare and self.teacher is not None:
            return fidelity(model, self.teacher, loader, self.context, self.autocast, check=check)
        return evaluate(model, loader, self.context, self.autocast, check)

    def stop(self, stage: Stage, signal_number: int) -> None:
        self.save_last()
        where = f"stage {stage.name}, epoch {self.position.epoch + 1}, step {self.position.step}"
        self.leave(f"at {where}", signal_number)

    def leave(self, where: str, signal_number: int) -> None:
        held = f"{self.run.path / 'last.pth'} holds it"
        message = f"stopped {where}: {held}; the same command with --resume goes on" if self.context.main else ""
        raise signals.Stopped(signal_number, message, saved=True)

    def save_last(self) -> None:
        # The log first: a kill in between runs its rows again, which then replace themselves.
        self.run.append("steps.jsonl", self.curves)
        content = {
            **pack(self.model, self.config),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": {**vars(self.position), "sums": self.totals()},
            "fingerprint": self.fingerprint,
            **({"ema": self.ema.module.state_dict()} if self.ema else {}),
        }
        self.run.save("last.pth", content)
        self.curves = []
        self.context.barrier()

    def report(
        self, stage: Stage, train: dict, val: dict, seconds: float = 0.0, images: int = 0, waited: float = 0.0
    ) -> None:
        """Keeps the stage's best weights and logs the epoch; `val` is empty where it was not evaluated."""
        select_last = (stage.select or self.settings.select) == "last"
        # Of two of one top-1 the lower loss.
        if val and (select_last or (val["acc1"], -val["loss"]) > (self.position.best, -self.position.best_loss)):
            self.position.best, self.position.best_loss = val["acc1"], val["loss"]
            self.run.save("best.pth", pack(self.evaluated, self.config))
            self.handed_on = stage.optim.batch_size, val
        row = {
            "stage": stage.name,
            "stage_index": self.position.stage,
            "epoch": self.position.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train": train,
            "val": {name: val[name] for name in (*ACCURACY, "images")} if val else {},
            "seconds": round(seconds, 3),
            "images_per_s": round(images / seconds, 1) if seconds else 0.0,
            "data_seconds": round(waited, 3),
            "peak_memory_mb": round(peak_memory(self.context.device) / 1e6),
        }
        self.run.append("log.jsonl", [row])
        losses = " ".join(f"{name} {value:.4f}" for name, value in train.items())
        when = f"epoch {self.position.epoch}/{stage.optim.epochs}" if train else "before training"
        accuracy = f"top-1 {val['acc1']:.2f} top-5 {val['acc5']:.2f} val loss {val['loss']:.4f} " if val else ""
        say(self.context, f"  {when}: {accuracy}{losses}".rstrip())
