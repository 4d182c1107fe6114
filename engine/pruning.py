"""What prune.py does: regularized training, structured pruning, fine-tuning, and the report on all three."""

from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engine.count import count_all
from engine.distill import Distillation
from engine.evaluate import evaluate
from engine.hoyer import Regularized, unit_norms
from engine.jobs import data_from, from_last, load_teacher, optim_from, planned, say
from engine.shrink import Kept, keep_above, keep_share, keep_within, shrink
from engine.stages import Stage
from engine.train import Settings, Trainer
from models.replace import describe, load_model, mlps, pack, replacements, set_backend
from utils import arguments, names
from utils.distributed import Context
from utils.errors import FarError
from utils.figures import kept_units, pruning_curves, sweep_curve
from utils.run_folder import RunFolder, open_run


class Pruning:
    """One command: the model, its data and teacher, and a folder a training."""

    def __init__(self, args: Namespace, context: Context, pretrained: dict[str, str]):
        chosen = [f for f in ("sensitivity", "keep_ratio", "target_params", "sweep") if getattr(args, f) is not None]
        if len(chosen) > 1:
            flags = " and ".join("--" + f.replace("_", "-") for f in chosen)
            raise FarError(f"{flags}: each says by itself what to remove; give one of them")
        if args.distill and not args.base_weight:
            raise FarError("--distill: needs the teacher's weights; name them with --base-weight FILE")
        torch.manual_seed(args.seed)
        self.args, self.context = args, context
        self.path = self._find(args, pretrained)
        self.model, self.config = load_model(self.path, "--model-path", args.drop, args.drop_path)
        self._check(args)
        self.data = data_from(args, self.config.img_size, context)
        if self.data.num_classes != self.config.num_classes:
            raise FarError(
                f"--model-path {self.path}: knows {self.config.num_classes} classes, --dataset {args.dataset} has "
                f"{self.data.num_classes}; move it there first with main.py --mode downstream"
            )
        self.teacher = load_teacher(args, self.config).to(context.device) if args.base_weight else None
        self.distill = self.teacher is not None and args.distill is not False
        self.settings = Settings(
            args.seed, args.amp, args.smoothing, args.mixup, args.cutmix, args.select, lstm_backend=args.lstm_backend
        )
        self.regularize, self.fine_tune = (optim_from(args, prefix, context) for prefix in ("", "ft_"))
        if self.regularize.epochs or self.fine_tune.epochs:
            planned(
                [self._stage(*each) for each in (("regularize", self.regularize), ("fine-tune", self.fine_tune))],
                self.data,
                self.settings,
            )
        self._select(self.model)  # a selection that cannot be met is told before hours of training

    def _find(self, args: Namespace, pretrained: dict[str, str]) -> Path:
        scale = arguments.choose_model(args).removeprefix("DeiT-")
        if not (args.model_path or pretrained.get(scale)):
            raise FarError(
                f"--model-path: none given and PRETRAINED_PATH[{scale!r}] in main.py is empty; name a FAR checkpoint"
            )
        return args.model_path or Path(pretrained[scale])

    def _check(self, args: Namespace) -> None:
        if (args.scale or args.base_model) and (asked := arguments.choose_model(args)) != self.config.base_model:
            raise FarError(f"--scale: says {asked}, but {self.path} holds a {self.config.base_model}; make them agree")
        if args.input_size and args.input_size != self.config.img_size:
            raise FarError(
                f"--input-size {args.input_size}: {self.path} was trained at {self.config.img_size}; leave the flag out"
            )
        if not unit_norms(replacements(self.model)):
            raise FarError(
                f"--model-path {self.path}: has no LSTM whose units could be pruned; name a FAR model with LSTMs"
            )

    def run(self) -> dict:
        """All three steps; what an earlier, interrupted call finished is not done again. Returns the report."""
        with open_run(vars(self.args), "prune", self.context) as top:
            report = self._steps(top)
            top.write_json("prune_report.json", report)
        say(self.context, "\n" + table(report))
        say(self.context, f"\nwritten to {top.path}")
        return report

    def _steps(self, top: RunFolder) -> dict:
        self.model.to(self.context.device)
        report = {"model": str(self.path), "seed": self.args.seed, "rows": [self._measure("before", self.model)]}
        if self.teacher is not None:
            report["teacher"] = self._measure("teacher", self.teacher)
        folder = top.child("regularize")
        model = self._train(folder, self.model, self.regularize, "regularize")
        report["rows"].append(self._measure("regularized", model))
        if self.context.main:
            top.figure(pruning_curves(folder.rows("steps.jsonl"), self.args.reg), "regularize.png")
        if self.args.sweep:
            report["sweep"] = [self._sweep(top, folder, ratio) for ratio in self.args.sweep]
            top.figure(sweep_curve(report["sweep"], report["rows"][0], report.get("teacher")), "sweep.png")
        else:
            report["rows"] += self._prune(top, model)
            report["units"] = describe(self.last, self.config).units
        return report

    def _sweep(self, top: RunFolder, regularized: RunFolder, ratio: float) -> dict:
        model, _ = load_model(regularized.path / "best.pth", "--output-dir", self.args.drop, self.args.drop_path)
        rows = self._prune(top.child(f"keep-{ratio:g}"), model.to(self.context.device), ratio)
        return {"keep_ratio": ratio, "pruned_acc1": rows[0]["acc1"], **rows[1]}

    def _train(self, run: RunFolder, model, optim, name: str):
        """One training in its folder, best.pth holding what it hands on; without epochs, the model as it is."""
        if run.resumed and run.has("result.json"):
            model, _ = load_model(run.path / "best.pth", "--resume", self.args.drop, self.args.drop_path)
            set_backend(model, self.args.lstm_backend)
            return model.to(self.context.device)
        model, last = from_last(self.args, run, model, self.config)
        stage = self._stage(name, optim)
        set_backend(model, self.args.lstm_backend)
        if optim.epochs:
            task = partial(self._task, model, name == "regularize")
            result = Trainer(model, self.config, [stage], task, self.data, run, self.context, self.settings, last).fit()
        else:
            run.save("best.pth", pack(model, self.config))
            result = self._evaluate(model)
        run.write_json("result.json", result)
        return model

    def _stage(self, name: str, optim) -> Stage:
        # While regularizing, the epoch with the best top-1 is the least regularized: the last one goes on.
        select = "last" if name == "regularize" else ""
        stage = Stage(name, (), tuple(range(len(self.model.blocks))), "full", "classification", "output", optim, select)
        return replace(stage, loss="combine", blocks=tuple(self.config.replaced)) if self.distill else stage

    def _task(self, model, regularizing: bool, stage: Stage, criterion):
        task = Distillation(model, self.teacher, stage, criterion)
        if not regularizing:
            return task
        weak = names.SENSITIVITY if self.args.sensitivity is None else self.args.sensitivity
        return Regularized(task, model, self.args.reg, self.args.decay, self.args.prune_mlp is not None, weak)

    def _select(self, model, ratio: float | None = None) -> tuple[Kept, Kept]:
        """The selections the flags ask for: (of LSTM units, of MLP units)."""
        args, norms, mlp = self.args, unit_norms(replacements(model)), {}
        if args.prune_mlp:
            mlp = keep_share(unit_norms(mlps(model)), args.prune_mlp, "--prune-mlp")
        for r in [ratio] if ratio else args.sweep or [args.keep_ratio]:
            if r:
                kept = keep_share(norms, r, "--sweep" if args.sweep else "--keep-ratio")
        if args.target_params:
            removed = sum(model.blocks[i].mlp.fc1.out_features - len(index) for (i,), index in mlp.items())
            kept = keep_within(model, norms, args.target_params + removed * (2 * model.embed_dim + 1))
        elif not (args.sweep or args.keep_ratio):
            kept = keep_above(norms, names.SENSITIVITY if args.sensitivity is None else args.sensitivity)
        return kept, mlp

    def _prune(self, run: RunFolder, model, ratio: float | None = None) -> list[dict]:
        """Shrinks and fine-tunes; returns what was measured after each."""
        kept, mlp = self._select(model, ratio)
        shrink(replacements(model), kept)
        shrink(mlps(model), mlp)
        rows = [self._measure("pruned", model)]
        self.last = self._train(run, model, self.fine_tune, "fine-tune")
        if self.context.main:
            config = describe(self.last, self.config)
            full = {str(i): self.model.blocks[i].attn.sizes for i in self.config.replaced}
            run.figure(kept_units({**full, **config.units}, self._width()), "units.png")
        return [*rows, self._measure("fine-tuned", self.last)]

    def _width(self) -> int:
        attn = self.model.blocks[self.config.replaced[0]].attn
        return self.model.embed_dim // attn.num_heads

    def _evaluate(self, model) -> dict[str, float]:
        autocast = self.settings.autocast(self.context.device)
        return evaluate(model, self.data.val_loader(self.args.batch_size), self.context, autocast)

    def _measure(self, when: str, model) -> dict:
        return {"when": when, **self._evaluate(model), **count_all(model, describe(model, self.config))}


def table(report: dict) -> str:
    """The report as text: one line a step, or a keep ratio."""
    rows = [*report["rows"], *({**r, "when": f"keep {r['keep_ratio']:g}"} for r in report.get("sweep", []))]
    if "teacher" in report:
        rows = [report["teacher"], *rows]
    lines = [f"{'':<13}{'top-1 %':>9}{'top-5 %':>9}{'units':>8}{'parameters':>13}{'M MACs':>9}{'kB':>9}"]
    for r in rows:
        lines.append(
            f"{r['when']:<13}{r['acc1']:>9.2f}{r['acc5']:>9.2f}{r['units']:>8}"
            f"{r['parameters']:>13,}{r['macs'] / 1e6:>9.1f}{r['bytes'] / 1e3:>9.0f}"
        )
    return "\n".join(lines)


def prune(args: Namespace, context: Context, pretrained: dict[str, str]) -> dict:
    """prune.py's job; see `Pruning`."""
    return Pruning(args, context, pretrained).run()
