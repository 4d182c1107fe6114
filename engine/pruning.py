"""What prune.py does: regularized training, structured pruning, fine-tuning, and the report on all three."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

import torch

from datasets.classes import check_classes
from deploy import latency
from engine.activations import Grams, activation_score, first_batches, refit, unit_grams
from engine.distill import Distillation
from engine.dry_run import show_dry_run
from engine.evaluate import evaluate
from engine.fidelity import farthest, fidelity, of_teacher
from engine.hoyer import Norms, Regularized, unit_norms
from engine.shrink import Kept, keep_above, keep_share, keep_within, relative, shrink
from engine.stages import Stage
from engine.steps import (
    check_stages,
    label_by_teacher,
    load_best,
    load_data,
    load_far,
    load_teacher,
    train_stages,
    with_data,
)
from models.count import count_all
from models.parts import BlockPart, Place
from models.replace import describe, mlps, pack, replacements
from models.weights import read
from plots.figures import fidelity_by_block, kept_units, pruning_curves, save_figure, sweep_curve
from utils import names, terminal
from utils.arguments import Latency
from utils.configs import PruneCommand
from utils.distributed import Context, say
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run

AFTER = {"regularize": "regularized", "fine-tune": "fine-tuned"}  # what the report calls a model after a training
BlockParts = Mapping[int, BlockPart]  # by block

# What ranks units, largest first: from parts, and from what is seen of them on images where that is asked for.
SCORES: dict[str, Callable[[BlockParts, Callable[[], Grams]], Norms]] = {
    "norm": lambda parts, seen: unit_norms(parts),
    "carried": lambda parts, seen: activation_score(parts, seen()),
}


def keep_fast(norms: Norms, table: latency.LatencyTable, target: Latency) -> Kept:
    """Keeps each place's best units, so many that the predicted time is within the target.

    As long as it is not, the place that loses the least of s_j / mean(s) for a millisecond goes down to a number of the
    table. Raises FarError where one unit a place takes longer.
    """
    limit, ms = table.target_ms(target), table.ms
    if table.ms_at(1) > limit:
        raise FarError(
            f"--target-latency {target}: is {limit:.2f} ms, and one unit a head and direction takes "
            f"{table.ms_at(1):.2f} (batch {table.batch}, {table.threads} threads; the teacher {table.teacher_ms:.2f}); "
            "raise it (or shrink the MLPs too, --prune-mlp)"
        )
    ranked = {place: s.sort(descending=True, stable=True) for place, s in relative(norms).items()}
    sums = {place: [0.0, *s.values.double().cumsum(0).tolist()] for place, s in ranked.items()}
    sizes = {place: len(s) for place, s in norms.items()}

    def prices() -> Iterable[tuple[float, Place, int]]:
        for place, size in sizes.items():
            for level in ms:
                if level < size and (saved := table.ms_at(size) - ms[level]) > 0:
                    yield (sums[place][size] - sums[place][level]) / saved, place, level

    while table.predict(sizes.values()) > limit:
        _, place, level = min(prices())
        sizes[place] = level
    return {place: s.indices[: sizes[place]].sort().values for place, s in ranked.items()}


class Pruning:
    """One command: the model, its data and teacher, and its two trainings. Raises FarError where they do not fit."""

    def __init__(self, command: PruneCommand, context: Context):
        self.command, self.context, self.settings = command, context, command.settings
        torch.manual_seed(command.settings.seed)
        self.path = command.model_path
        self.model, config = load_far(command, context, "--model-path", self.path)
        if not unit_norms(replacements(self.model)):
            raise FarError(f"--model-path {self.path}: has no units to prune; name a FAR model with recurrent cells")
        if command.prune_mlp and not mlps(self.model):
            kind = type(self.model.blocks[0].mlp).__name__
            raise FarError(f"--prune-mlp: a {config.base_model} has {kind}, not fc1, GELU, fc2; leave it out")
        self.data = load_data(command.data, config, context)
        mend = "move it there first with main.py --mode downstream"
        check_classes(f"--model-path {self.path}", config, self.data, mend)
        self.config = with_data(config, self.data)
        self.teacher = None
        if weight := command.model.base_weight:
            self.teacher = load_teacher(read(weight, "--base-weight"), self.config).to(context.device)
        label_by_teacher(self.data, self.teacher, command.settings, context)

        blocks, loss = tuple(range(len(self.model.blocks))), "classification"
        if self.teacher is not None and command.distill is not False:
            blocks, loss = tuple(config.replaced), command.distill_loss
        common = (), blocks, "full", loss, "output"
        # While regularizing, the epoch with the best top-1 is the least regularized: the last one goes on.
        self.regularize = Stage("regularize", *common, command.scaled(command.optim, context.world), "last")
        self.fine_tune = Stage("fine-tune", *common, command.scaled(command.ft_optim, context.world))
        self.trained = [stage for stage in (self.regularize, self.fine_tune) if stage.optim.epochs]
        check_stages(self.trained, self.data, self.settings)
        self.table = None
        if command.target_latency:
            how = command.run, self.model, self.config, command.latency_batch or 1, command.prune_mlp, command.precision
            self.table = context.on_main(lambda: latency.load_or_measure(*how))
        for ratio in command.sweep or [command.keep_ratio]:
            self.select(self.model, ratio, unit_norms)  # what cannot be met is told before hours of training

    def task(self, model, stage: Stage, criterion) -> torch.nn.Module:
        task, command = Distillation(model, stage, criterion, self.teacher), self.command
        if stage.name != "regularize":
            return task
        threshold = command.sensitivity or names.SENSITIVITY["norm"]  # of what is counted while norms are regularized
        return Regularized(task, model, command.reg, command.decay, command.prune_mlp is not None, threshold)

    def run(self) -> dict:
        """Regularizes, prunes, fine-tunes; what an earlier, interrupted call finished is not done again.

        Returns the report. With --dry-run it says what would train, and stops.
        """
        command, context, config = self.command, self.context, self.config
        if command.run.dry_run:
            show_dry_run(command, self.model, config, self.trained, self.task, self.data)
            return {}
        with open_run(command.run, context, self.data.fingerprint) as run:
            if self.table:
                run.write_json(latency.FILE, {"table": asdict(self.table)})
            before = {"when": "before", **self.measure(self.model.to(context.device))}
            report = {"model": str(self.path), "seed": self.settings.seed, "rows": [before]}
            if self.teacher is not None:
                sizes = count_all(self.teacher, describe(self.teacher, config))
                report["teacher"] = {**of_teacher(before), **sizes, "when": "teacher"}
            folder = run.child("regularize")
            model, row = self.train(folder, self.model, self.regularize, before)
            report["rows"].append(row)
            if context.main:
                curves = pruning_curves(folder.rows("steps.jsonl"), command.reg)
                save_figure(curves, run.path / "regularize.png")
            if command.sweep:
                report["sweep"] = []
                for ratio in command.sweep:
                    model = load_best(folder, command)
                    _, (pruned, tuned) = self.prune(run.child(f"keep-{ratio:g}"), model, ratio)
                    report["sweep"].append({"keep_ratio": ratio, "pruned_acc1": pruned["acc1"], **tuned})
                if context.main:
                    figure = sweep_curve(report["sweep"], before, report.get("teacher"))
                    save_figure(figure, run.path / "sweep.png")
            else:
                model, rows = self.prune(run, model, command.keep_ratio)
                report["rows"] += rows
                report["units"] = describe(model, config).units
            run.write_json("prune_report.json", report)
            if self.teacher is not None and context.main:
                save_figure(fidelity_by_block({row["when"]: row for row in report["rows"]}), run.path / "fidelity.png")
        say(context, "\n" + table(report))
        say(context, f"\nwritten to {run.path}")
        return report

    def train(self, run: RunFolder, model, stage: Stage, before: dict) -> tuple[torch.nn.Module, dict]:
        """One training in its folder, best.pth holding what it hands on. Returns that and what is measured of it.

        before: what was measured of the model, which holds where nothing trains.
        """
        command = self.command
        if run.resumed and run.has("result.json"):
            return load_best(run, command), run.read_json("result.json")
        measured = before
        if stage.optim.epochs:
            model, result = train_stages(run, command, model, self.config, [stage], self.task, self.data, self.teacher)
            measured = self.sized(model, result)
        else:
            run.save("best.pth", pack(model, self.config))
        row = {**measured, "when": AFTER[stage.name]}
        run.write_json("result.json", row)
        return model, row

    def prune(self, run: RunFolder, model, ratio: float | None) -> tuple[torch.nn.Module, list[dict]]:
        """Selects, refits, shrinks and fine-tunes. Returns the model and what was measured after each training."""
        autocast, context = self.settings.autocast(self.context.device), self.context

        def seen(parts: BlockParts) -> Grams:
            """What the units of parts carry on training images."""
            images = first_batches(self.data, self.regularize.optim.batch_size, context)
            return unit_grams(model, parts, images, context, autocast)

        score = SCORES[self.command.score]
        units, mlp_units = self.select(model, ratio, lambda parts: score(parts, lambda: seen(parts)))
        for parts, kept in ((replacements(model), units), (mlps(model), mlp_units)):
            if self.command.refit and kept:
                refit(parts, kept, seen(parts))
            shrink(parts, kept)
        pruned = {"when": "pruned", **self.measure(model)}
        timed = {}
        if self.table:
            how = model, self.config, self.table, self.command.target_latency
            timed["latency"] = context.on_main(lambda: latency.check_target(*how))
            say(context, latency.describe_timing(timed["latency"]))
        model, tuned = self.train(run, model, self.fine_tune, pruned)
        if context.main:
            parts = replacements(model)
            most = max(max(pair) for part in parts.values() for pair in part.full_sizes)
            save_figure(kept_units({str(i): part.sizes for i, part in parts.items()}, most), run.path / "units.png")
        return model, [{**pruned, **timed}, tuned]

    def select(self, model, ratio: float | None, scores: Callable[[BlockParts], Norms]) -> tuple[Kept, Kept]:
        """What the flags keep: (of the replacements' units, this share where one is given; of MLP units)."""
        command, norms, mlp = self.command, scores(replacements(model)), {}
        if command.prune_mlp:
            mlp = keep_share(scores(mlps(model)), command.prune_mlp, "--prune-mlp")
        if ratio:
            return keep_share(norms, ratio, "--sweep" if command.sweep else "--keep-ratio"), mlp
        if command.target_params:
            return keep_within(model, norms, command.target_params, mlp), mlp
        if self.table:
            return keep_fast(norms, self.table, command.target_latency), mlp
        return keep_above(norms, command.threshold), mlp

    def measure(self, model) -> dict:
        """Accuracy, and fidelity where there is a teacher, in one pass; sizes."""
        loader = self.data.val_loader(self.regularize.optim.batch_size)
        how = loader, self.context, self.settings.autocast(self.context.device)
        return self.sized(model, evaluate(model, *how) if self.teacher is None else fidelity(model, self.teacher, *how))

    def sized(self, model, measured: dict) -> dict:
        """What was measured of a model, and its sizes."""
        return {**measured, **count_all(model, describe(model, self.config))}


# Heads of the report's table: the key in a row, how it is written, and what it is multiplied by.
BASIC = {"top-1 %": ("acc1", ".2f", 1), "top-5 %": ("acc5", ".2f", 1)}
BESIDE_TEACHER = {
    "agrees %": ("agreement", ".2f", 1),
    "KL": ("kl", ".4f", 1),
    "repeats": ("repeated_errors", "", 1),
    "least z": ("least_z", ".3f", 1),
    "error": ("most_error", ".3f", 1),
}
SIZES = {
    "units": ("units", "", 1),
    "parameters": ("parameters", ",", 1),
    "M MACs": ("macs", ".1f", 1e-6),
    "kB": ("bytes", ".0f", 1e-3),
}


def table(report: dict) -> str:
    """The report as text: one line a step, or a keep ratio."""
    rows = [*report["rows"], *({**r, "when": f"keep {r['keep_ratio']:g}"} for r in report.get("sweep", []))]
    columns = {**BASIC, **SIZES}
    if "teacher" in report:
        columns = {**BASIC, **BESIDE_TEACHER, **SIZES}
        rows = [{**row, **farthest(row)} for row in (report["teacher"], *rows)]
    cells = ([row["when"], *(f"{row[key] * scale:{form}}" for key, form, scale in columns.values())] for row in rows)
    return terminal.table([["", *columns], *cells])
