"""What prune.py does: regularized training, structured pruning, fine-tuning, and the report on all three."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import torch

from deploy import latency
from engine.activations import Grams, carried, first_batches, refit, unit_grams
from engine.distill import Distillation
from engine.evaluate import evaluate
from engine.fidelity import farthest, fidelity, of_teacher
from engine.hoyer import Norms, Regularized, unit_norms
from engine.plan import show_plan
from engine.shrink import Kept, keep_above, keep_share, keep_within, shrink
from engine.stages import Stage
from engine.steps import (
    answer_by,
    check_backend,
    check_classes,
    load_data,
    load_far,
    load_teacher,
    planned,
    reading,
    resumed,
    say,
)
from engine.train import Trainer
from models.count import count_all
from models.parts import BlockPart
from models.replace import describe, load_model, mlps, pack, replacements, set_backend
from plots.figures import draw_curves, fidelity_by_block, kept_units, pruning_curves, save_figure, sweep_curve
from utils import names
from utils.configs import Optim, PruneCommand
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run

AFTER = {"regularize": "regularized", "fine-tune": "fine-tuned"}  # what the report calls a model after a training
Parts = Mapping[int, BlockPart]  # by block

# What ranks units, largest first: from parts, and from what is seen of them on images where that is asked for.
SCORES: dict[str, Callable[[Parts, Callable[[], Grams]], Norms]] = {
    "norm": lambda parts, seen: unit_norms(parts),
    "carried": lambda parts, seen: carried(parts, seen()),
}


class Pruning:
    """One command: the model, its data and teacher, and a folder a training."""

    def __init__(self, command: PruneCommand, context: Context):
        torch.manual_seed(command.settings.seed)
        self.command, self.context, self.settings = command, context, command.settings
        self.path, self.model, self.config = load_far(command.far, command.model)
        if not unit_norms(replacements(self.model)):
            raise FarError(f"--model-path {self.path}: has no units to prune; name a FAR model with LSTMs or GRUs")
        if command.prune_mlp and not mlps(self.model):
            kind = type(self.model.blocks[0].mlp).__name__
            raise FarError(f"--prune-mlp: a {self.config.base_model} has {kind}, not fc1, GELU, fc2; leave it out")
        check_backend(self.config, self.settings, context)
        self.data = load_data(command.data, self.config, context)
        check_classes(
            f"--model-path {self.path}", self.config, self.data, "move it there first with main.py --mode downstream"
        )
        self.config = reading(self.config, self.data)
        self.teacher = None
        if command.model.base_weight:
            self.teacher = load_teacher(command.model, self.config).to(context.device)
        answer_by(self.teacher, self.data, command.settings, context)
        self.distill = self.teacher is not None and command.distill is not False
        self.regularize, self.fine_tune = (
            command.scaled(optim, context.world) for optim in (command.optim, command.ft_optim)
        )
        if self.regularize.epochs or self.fine_tune.epochs:
            stages = [self._stage("regularize", self.regularize), self._stage("fine-tune", self.fine_tune)]
            planned(stages, self.data, self.settings)
        self.latency = context.on_main(self._latency) if command.target_latency else None
        for ratio in command.sweep or [command.keep_ratio]:
            self._select(
                self.model, ratio, unit_norms
            )  # a selection that cannot be met is told before hours of training

    def _latency(self) -> latency.Table:
        command = self.command
        return latency.obtain(command.run, self.model, self.config, command.latency_batch or 1, command.prune_mlp)

    def run(self) -> dict:
        """All three steps; what an earlier, interrupted call finished is not done again. Returns the report.

        With --dry-run it says what would train, and stops.
        """
        if self.command.run.dry_run:
            return self._say_plan()
        with open_run(self.command.run, self.context, self.data.fingerprint) as top:
            if self.latency:
                top.write_json(latency.FILE, {"table": asdict(self.latency)})
            report = self._steps(top)
            top.write_json("prune_report.json", report)
            if self.teacher is not None and self.context.main:
                save_figure(fidelity_by_block({row["when"]: row for row in report["rows"]}), top.path / "fidelity.png")
        say(self.context, "\n" + table(report))
        say(self.context, f"\nwritten to {top.path}")
        return report

    def _say_plan(self) -> dict:
        plans = (("regularize", self.regularize), ("fine-tune", self.fine_tune))
        stages = [self._stage(name, optim) for name, optim in plans if optim.epochs]
        task = partial(Distillation, self.model, self.teacher)
        show_plan(self.model, self.config, stages, task, self.data, self.command.run, self.context, self.settings)
        return {}

    def _steps(self, top: RunFolder) -> dict:
        command = self.command
        self.model.to(self.context.device)
        before = {"when": "before", **self._measure(self.model)}
        report = {"model": str(self.path), "seed": self.settings.seed, "rows": [before]}
        if self.teacher is not None:
            sizes = count_all(self.teacher, describe(self.teacher, self.config))
            report["teacher"] = {**of_teacher(before), **sizes, "when": "teacher"}
        folder = top.child("regularize")
        model, row = self._train(folder, self.model, self.regularize, "regularize", before)
        report["rows"].append(row)
        if self.context.main:
            save_figure(pruning_curves(folder.rows("steps.jsonl"), command.reg), top.path / "regularize.png")
        if command.sweep:
            report["sweep"] = [self._sweep(top, folder, ratio) for ratio in command.sweep]
            if self.context.main:
                figure = sweep_curve(report["sweep"], report["rows"][0], report.get("teacher"))
                save_figure(figure, top.path / "sweep.png")
        else:
            pruned, rows = self._prune(top, model, command.keep_ratio)
            report["rows"] += rows
            report["units"] = describe(pruned, self.config).units
        return report

    def _sweep(self, top: RunFolder, regularized: RunFolder, ratio: float) -> dict:
        model = self._load(regularized, "--output-dir")
        _, (pruned, tuned) = self._prune(top.child(f"keep-{ratio:g}"), model, ratio)
        return {"keep_ratio": ratio, "pruned_acc1": pruned["acc1"], **tuned}

    def _load(self, run: RunFolder, flag: str):
        """What a finished training handed on."""
        asked = self.command.model
        return load_model(run.path / "best.pth", flag, asked.drop, asked.drop_path)[0].to(self.context.device)

    def _train(self, run: RunFolder, model, optim: Optim, name: str, before: dict) -> tuple[torch.nn.Module, dict]:
        """One training in its folder, best.pth holding what it hands on. Returns that and what is measured of it.

        before: what was measured of the model, which holds where nothing trains.
        """
        finished = run.resumed and run.has("result.json")
        if finished:
            model = self._load(run, "--resume")
        else:
            model, last = resumed(run, model, self.config, self.command.model)
        set_backend(model, self.settings.lstm_backend)
        if optim.epochs and not finished:
            stages, task = [self._stage(name, optim)], partial(self._task, model, name == "regularize")
            Trainer(model, self.config, stages, task, self.data, run, self.context, self.settings, last).fit()
            draw_curves(run)
        elif not finished:
            run.save("best.pth", pack(model, self.config))
        row = {**(self._measure(model) if optim.epochs else before), "when": AFTER[name]}
        run.write_json("result.json", row)
        return model, row

    def _stage(self, name: str, optim: Optim) -> Stage:
        # While regularizing, the epoch with the best top-1 is the least regularized: the last one goes on.
        select = "last" if name == "regularize" else ""
        stage = Stage(name, (), tuple(range(len(self.model.blocks))), "full", "classification", "output", optim, select)
        if not self.distill:
            return stage
        return replace(stage, loss=self.command.distill_loss, blocks=tuple(self.config.replaced))

    def _task(self, model, regularizing: bool, stage: Stage, criterion):
        task, command = Distillation(model, self.teacher, stage, criterion), self.command
        if not regularizing:
            return task
        threshold = command.sensitivity or names.SENSITIVITY["norm"]  # of what is counted while norms are regularized
        return Regularized(task, model, command.reg, command.decay, command.prune_mlp is not None, threshold)

    def _seen(self, model, parts: Parts) -> Grams:
        """What the units of parts carry on training images."""
        images = first_batches(self.data, self.regularize.batch_size, self.context)
        return unit_grams(model, parts, images, self.context, self.settings.autocast(self.context.device))

    def _scores(self, model, parts: Parts) -> Norms:
        return SCORES[self.command.score](parts, partial(self._seen, model, parts))

    def _select(self, model, ratio: float | None, scores: Callable[[Parts], Norms]) -> tuple[Kept, Kept]:
        """What the flags keep: (of LSTM units, this share where one is given; of MLP units)."""
        command, norms, mlp = self.command, scores(replacements(model)), {}
        if command.prune_mlp:
            mlp = keep_share(scores(mlps(model)), command.prune_mlp, "--prune-mlp")
        if ratio:
            return keep_share(norms, ratio, "--sweep" if command.sweep else "--keep-ratio"), mlp
        if command.target_params:
            return keep_within(model, norms, command.target_params, mlp), mlp
        if self.latency:
            return latency.keep_fast(norms, self.latency, command.target_latency), mlp
        return keep_above(norms, command.threshold), mlp

    def _prune(self, run: RunFolder, model, ratio: float | None) -> tuple[torch.nn.Module, list[dict]]:
        """Shrinks and fine-tunes. Returns the model and what was measured after each."""
        kept, mlp = self._select(model, ratio, partial(self._scores, model))
        for parts, units in ((replacements(model), kept), (mlps(model), mlp)):
            if self.command.refit and units:
                refit(parts, units, self._seen(model, parts))
            shrink(parts, units)
        pruned = {"when": "pruned", **self._measure(model)}
        timed = self._timed(model)
        model, tuned = self._train(run, model, self.fine_tune, "fine-tune", pruned)
        if self.context.main:
            config = describe(model, self.config)
            parts = replacements(self.model)
            units = {**{str(i): part.sizes for i, part in parts.items()}, **config.units}
            most = max(max(pair) for part in parts.values() for pair in part.full_sizes)
            save_figure(kept_units(units, most), run.path / "units.png")
        return model, [{**pruned, **timed}, tuned]

    def _timed(self, model) -> dict:
        """How fast the shrunk model is, where that was asked for, also said in one line."""
        if not self.latency:
            return {}
        args = model, self.config, self.latency, self.command.target_latency
        found = self.context.on_main(lambda: latency.check(*args))
        say(self.context, latency.summary(found))
        return {"latency": found}

    def _measure(self, model) -> dict:
        """Accuracy, and fidelity where there is a teacher, in one pass; sizes."""
        loader = self.data.val_loader(self.command.optim.batch_size)
        how = loader, self.context, self.settings.autocast(self.context.device)
        found = evaluate(model, *how) if self.teacher is None else fidelity(model, self.teacher, *how)
        return {**found, **count_all(model, describe(model, self.config))}


class Column(NamedTuple):
    title: str
    key: str
    width: int
    form: str
    scale: float = 1


BASIC = [Column("top-1 %", "acc1", 9, ".2f"), Column("top-5 %", "acc5", 9, ".2f")]
TAUGHT = [  # where there is a teacher
    Column("agrees %", "agreement", 10, ".2f"),
    Column("KL", "kl", 8, ".4f"),
    Column("repeats", "repeated_errors", 9, ""),
    Column("least z", "least_z", 9, ".3f"),
    Column("error", "most_error", 7, ".3f"),
]
SIZES = [
    Column("units", "units", 8, ""),
    Column("parameters", "parameters", 13, ","),
    Column("M MACs", "macs", 9, ".1f", 1e-6),
    Column("kB", "bytes", 9, ".0f", 1e-3),
]


def table(report: dict) -> str:
    """The report as text: one line a step, or a keep ratio."""
    rows = [*report["rows"], *({**r, "when": f"keep {r['keep_ratio']:g}"} for r in report.get("sweep", []))]
    if "teacher" in report:
        rows = [{**row, **farthest(row)} for row in (report["teacher"], *rows)]
    columns = [*BASIC, *(TAUGHT if "teacher" in report else []), *SIZES]
    lines = [" " * 13 + "".join(f"{c.title:>{c.width}}" for c in columns)]
    for row in rows:
        values = (f"{row[c.key] * c.scale:>{c.width}{c.form}}" for c in columns)
        lines.append(f"{row['when']:<13}" + "".join(values))
    return "\n".join(lines)
