"""The modes of main.py: each opens weights and data, lists its stages, trains and reports."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from datasets.classes import check_classes, keeps_classifier, order_classes
from datasets.loading import Data
from deploy.fuse import fuse
from deploy.packed import PRECISIONS
from deploy.predict import as_text, find_pictures, picture_loader, write
from deploy.predict import predict as predicted
from engine.distill import Distillation, find_loss
from engine.evaluate import evaluate
from engine.fidelity import fidelity, summary
from engine.plan import show_plan
from engine.ranking import ASIDE, FILE, Hybrids, as_record, loss_of_each_block, rank_blocks, read_ranking
from engine.stages import Stage, distillation
from engine.steps import (
    answer_by,
    check_backend,
    load_best,
    load_data,
    load_far,
    load_labelled,
    load_teacher,
    name_teacher,
    planned,
    read_teacher,
    reading,
    resumed,
)
from engine.train import Trainer
from models.choosing import choose_kernels
from models.deit import check_size, create_teacher
from models.replace import (
    FarConfig,
    count_parameters,
    load_model,
    parse_blocks,
    replaced_blocks,
    reset_classifier,
    resize,
    set_backend,
)
from models.weights import Weights, load_teacher_weights
from plots.figures import cost_of_blocks, draw_curves, save_figure
from utils.configs import ModeCommand, ModelConfig, Optim
from utils.distributed import Context, say
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run


def start(
    command: ModeCommand, context: Context, load=load_data, trains: bool = True
) -> tuple[Data, FarConfig, Weights | None]:
    """The data, the configuration of the teacher as its weights and the flags describe it, and --base-weight's file."""
    torch.manual_seed(command.settings.seed)
    flags = command.model
    weights = read_teacher(flags)
    config = name_teacher(flags, weights)
    config = replace(config, rep_by=flags.rep_by, img_size=flags.input_size or config.img_size)
    check_size(config.base_model, config.img_size)
    return load(command.data, config, context, trains), config, weights


def taught(command: ModeCommand, config: FarConfig, data: Data) -> FarConfig:
    """The configuration of a teacher that is to answer for a data set's classes."""
    where = f"--base-weight {command.model.base_weight or f'(published {config.base_model})'}"
    if config.classes and data.names:
        check_classes(where, config, data, "train a teacher on this data first with --mode teacher")
    elif not (data.labelled or config.num_classes):
        raise FarError(f"{where}: holds no classifier; give a teacher's weights with one")
    elif data.labelled and config.num_classes != data.num_classes:
        config = replace(config, num_classes=data.num_classes, classes=())
    return reading(config, data)


def fresh(model_config: ModelConfig, config: FarConfig) -> VisionTransformer:
    drop, drop_path = model_config.drop, model_config.drop_path
    return create_teacher(config.base_model, config.num_classes, config.img_size, drop, drop_path)


def run_stages(
    command: ModeCommand,
    context: Context,
    model: VisionTransformer,
    config: FarConfig,
    stages: list[Stage],
    data: Data,
    reference: VisionTransformer | None = None,
    choose: Callable[[RunFolder, VisionTransformer], tuple[VisionTransformer, list[Stage]]] | None = None,
) -> dict[str, Any] | None:
    """Trains the stages in the run's folder and reports on the model that they hand on; --dry-run only says what would.

    reference: the teacher, where the stages distil from one; the report then tells how close the model is to it.
    choose: what makes model and stages from the model, in the run's folder; `stages` is then what it will be like.
    Returns the report.
    """

    def make_task(model: VisionTransformer, stage: Stage, criterion: nn.Module) -> nn.Module:
        return Distillation(model, reference, stage, criterion, command.distill_input)

    settings = command.settings
    stages = planned(stages, data, settings)
    if command.run.dry_run:
        more = f", {FILE}, ranking.png, attn/" if choose else ""
        show_plan(model, config, stages, make_task, data, command.run, context, settings, more)
        return None
    with open_run(command.run, context, data.fingerprint) as run:
        if reference is not None:
            reference.to(context.device)
        if choose:
            model, stages = choose(run, model)
        model, last = resumed(run, model, config, command.model)
        result = Trainer(model, config, stages, make_task, data, run, context, settings, last, reference).fit()
        draw_curves(run)
        run.write_json("result.json", {**result, "parameters": count_parameters(model)})
    say(
        context,
        f"top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images; weights in {run.path / 'best.pth'}",
    )
    return result


def teacher(command: ModeCommand, context: Context) -> None:
    """--mode teacher: trains the attention model itself, from --base-weight where given."""
    data, known, weights = start(command, context, load_labelled)
    keeps = bool(weights) and keeps_classifier(weights.source, known, data)
    if not keeps:
        known = replace(known, num_classes=data.num_classes, classes=())
    config = reading(known, data)
    model = fresh(command.model, config)
    if weights:
        load_teacher_weights(model, weights, keep_head=keeps)
    optim = command.scaled(command.optim, context.world)
    stage = Stage("teacher", (), (), "full", "classification", "output", optim)
    run_stages(command, context, model, config, [stage], data)


def train(command: ModeCommand, context: Context) -> None:
    """--mode train and block-distill: swap, then the stages of distillation."""
    if command.ranks:
        command = ranked_command(command)
    data, known, weights = start(command, context)
    config = taught(command, known, data)
    check_backend(config, command.settings, context)
    reference = load_teacher(weights, config)
    answer_by(reference, data, command.settings, context)
    depth = len(reference.blocks)
    blocks = parse_blocks("all" if command.ranks else command.replace, depth)
    if command.keep and command.keep > depth:
        raise FarError(f"--replace auto:{command.keep}: this model has {depth} blocks; give a smaller number")
    model, config = student(command, context, reference, config, blocks)
    block = command.scaled(command.block_ft_optim, context.world)
    attn = None if command.plan.skip_train_attn else command.scaled(command.optim, context.world)
    stages, choose = distillation(blocks, command.plan, attn, block), None
    if command.ranks:
        first = [of_each_block(stage) for stage in stages if stage.parts == "mixing"]
        stages = [*first, *distillation(blocks[: command.keep], command.plan, None, block)]
        choose = partial(choose_blocks, command, context, config, data, reference, first, block)
    result = run_stages(command, context, model, config, stages, data, reference, choose)
    if result:
        say(context, f"its teacher: top-1 {result['teacher_acc1']:.2f}; the student {summary(result)}")


def ranked_command(command: ModeCommand) -> ModeCommand:
    """What --replace auto makes of the other flags. Raises FarError where there would be nothing to rank."""
    plan = command.plan
    if not plan.attn_weight and (plan.skip_train_attn or not command.optim.epochs):
        raise FarError("--replace auto: ranks trained replacements; name them with --attn-weight, or train stage attn")
    if not plan.skip_train_attn:
        loss_of_each_block(plan.train_loss)
    if not command.block_ft_optim.epochs:
        raise FarError("--block-ft-epochs 0: --replace auto ends with stage block; set it above 0")
    return replace(command, data=replace(command.data, aside=ASIDE))


def of_each_block(stage: Stage) -> Stage:
    """The stage with a loss by which no block depends on another."""
    loss, target = loss_of_each_block(stage.loss), find_loss(stage.loss).compares or stage.target
    return replace(stage, loss=loss, target=target, select="last")


def choose_blocks(
    command: ModeCommand,
    context: Context,
    config: FarConfig,
    data: Data,
    teacher: VisionTransformer,
    first: list[Stage],
    block: Optim,
    run: RunFolder,
    model: VisionTransformer,
) -> tuple[VisionTransformer, list[Stage]]:
    """--replace auto: the model with the best blocks replaced and the teacher's others, and their block stages.

    first: the stages attn of all blocks, trained in the run's folder attn/ unless an earlier call has; none where
    --attn-weight brings them.
    """
    settings, folder = command.settings, run.child("attn") if first else run

    def make_task(model: VisionTransformer, stage: Stage, criterion: nn.Module) -> nn.Module:
        return Distillation(model, teacher, stage, criterion, "teacher")

    if first and folder.resumed and folder.has("result.json"):
        model = load_best(folder, command.model, "--resume")
    elif first:
        model, last = resumed(folder, model, config, command.model)
        result = Trainer(model, config, first, make_task, data, folder, context, settings, last, teacher).fit()
        draw_curves(folder)
        folder.write_json("result.json", result)
    model.to(context.device)
    if run.resumed and run.has(FILE):
        ranking = context.on_main(lambda: read_ranking(run.path / FILE, len(model.blocks)))
    else:
        choose_kernels(model, settings.lstm_backend, block.batch_size, context, needs_grad=False)
        images = [images.to(context.device) for images, _ in data.aside_loader(block.batch_size)]
        hybrids = Hybrids(teacher, model, images, context, settings.autocast(context.device))
        ranking = rank_blocks(command.rank or "greedy", hybrids)
        run.write_json(FILE, as_record(ranking))
    chosen = context.on_main(lambda: ranking.choose(command.keep, command.min_agreement))
    if context.main:
        save_figure(cost_of_blocks(ranking, len(chosen)), run.path / "ranking.png")
    cost = ranking.path[len(chosen) - 1]
    kept = f"{cost.agreement:.2f} % of the teacher's answers stay, KL {cost.kl:.4f}"
    say(context, f"--replace auto keeps blocks {', '.join(map(str, chosen))}, cheapest by {ranking.rank}: {kept}")
    hybrid = fresh(command.model, config)
    hybrid.load_state_dict(teacher.state_dict())
    for i in chosen:
        hybrid.blocks[i] = model.blocks[i]
    return hybrid, distillation(chosen, command.plan, None, block)


def student(
    command: ModeCommand, context: Context, reference: VisionTransformer, config: FarConfig, blocks: tuple[int, ...]
) -> tuple[VisionTransformer, FarConfig]:
    """The model that distillation starts from: --attn-weight, else the teacher's weights, to be swapped."""
    model_config, weight = command.model, command.plan.attn_weight
    if weight:
        model, stored = load_model(weight, "--attn-weight", model_config.drop, model_config.drop_path)
        if stored.num_classes == config.num_classes:
            order_classes(model, stored.classes, config.classes, f"--attn-weight {weight}")
        if command.ranks and replaced_blocks(model) != blocks:
            held = ", ".join(map(str, replaced_blocks(model)))
            raise FarError(f"--attn-weight {weight}: has blocks {held} replaced, --replace auto ranks all; name them")
        stored = replace(stored, preprocessing=config.preprocessing, classes=config.classes or stored.classes)
        check_same(weight, replace(config, replaced=blocks), replace(stored, replaced=replaced_blocks(model)))
        if stored.img_size != config.img_size:
            say(context, f"--attn-weight {weight}: its positions go from {stored.img_size} to {config.img_size} px")
            stored = resize(model, stored, config.img_size, f"--attn-weight {weight}")
        return model, stored
    model = fresh(model_config, config)
    model.load_state_dict(reference.state_dict())
    if command.plan.skip_train_attn:
        say(context, "no --attn-weight: the block stage starts from fresh modules")
    return model, config


def check_same(weight: Path, wanted: FarConfig, stored: FarConfig) -> None:
    """--attn-weight must be what the other flags describe."""
    for flag, ours, theirs in (
        ("--base-model", wanted.base_model, stored.base_model),
        ("--dataset", f"{wanted.num_classes} classes", f"{stored.num_classes} classes"),
        ("--rep-by", wanted.rep_by, stored.rep_by),
        ("--replace", list(wanted.replaced), list(stored.replaced)),
    ):
        if ours != theirs:
            raise FarError(f"--attn-weight {weight}: has {flag} {theirs}, the flags say {ours}; make them agree")


def load_start(command: ModeCommand, context: Context) -> tuple[Path, VisionTransformer, FarConfig]:
    """The FAR model that downstream and eval start from."""
    path, model, config = load_far(command.far, command.model)
    if not config.replaced:
        raise FarError(
            f"--far-weight {path}: holds a teacher, no block of it is replaced; evaluate it as --base-weight, or "
            "move it with --mode teacher --base-weight"
        )
    if command.ds_pruned and not config.pruned:
        raise FarError(f"--ds-pruned: {path} holds an unpruned model; leave the flag out or name a pruned checkpoint")
    check_backend(config, command.settings, context)
    return path, model, config


def downstream(command: ModeCommand, context: Context) -> None:
    """--mode downstream: a FAR model on another label set, with a fresh classifier where the classes differ."""
    torch.manual_seed(command.settings.seed)
    path, model, config = load_start(command, context)
    data = load_labelled(command.data, config, context)
    if not keeps_classifier(f"--far-weight {path}", config, data):
        reset_classifier(model, data.num_classes, torch.Generator().manual_seed(command.settings.seed))
        config = replace(config, num_classes=data.num_classes, classes=())
        if command.ds_mode == "FC":
            say(context, "--ds-mode FC: the classifier is fresh and does not train; FC+head would train it")
    config, blocks = reading(config, data), tuple(range(len(model.blocks)))
    optim = command.scaled(command.optim, context.world)
    stage = Stage("downstream", (), blocks, command.ds_mode, "classification", "output", optim)
    run_stages(command, context, model, config, [stage], data)


def load_evaluated(command: ModeCommand, context: Context):
    """What eval reads: (the weights' file, the model, the teacher that it is compared with or None, the data)."""
    weight = command.model.base_weight
    if not (command.far.path or command.ds_pruned) and weight:
        data, config, weights = start(command, context, load_labelled, trains=False)
        return weight, load_teacher(weights, taught(command, config, data)), None, data
    path, model, config = load_start(command, context)
    data = load_data(command.data, config, context, trains=False)
    check_classes(f"--far-weight {path}", config, data, "move it there with --mode downstream")
    return path, model, load_teacher(read_teacher(command.model), config) if weight else None, data


def eval_mode(command: ModeCommand, context: Context) -> None:
    """--mode eval: a FAR checkpoint, compared with the teacher where --base-weight names one; or a teacher alone."""
    path, model, reference, data = load_evaluated(command, context)
    answer_by(reference, data, command.settings, context)
    parameters = count_parameters(model)
    model.to(context.device)
    choose_kernels(model, command.settings.lstm_backend, command.optim.batch_size, context, needs_grad=False)
    if command.fuse:
        model = fuse(model, PRECISIONS[command.fuse])
    loader, autocast = data.val_loader(command.optim.batch_size), command.settings.autocast(context.device)
    with open_run(command.run, context) if command.run.output_dir else nullcontext() as run:
        if reference is None:
            result = evaluate(model, loader, context, autocast)
        else:
            inside = () if command.fuse else None
            result = fidelity(model, reference.to(context.device), loader, context, autocast, inside)
        result["parameters"] = parameters
        if run:
            run.write_json("result.json", result)
    say(
        context,
        f"{path}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images, {result['parameters']:,} parameters",
    )
    if reference is not None:
        say(context, f"it {summary(result)}")


def predict(command: ModeCommand, context: Context) -> None:
    """--mode predict: the likeliest classes of pictures, by any checkpoint of ours."""
    prediction, files = command.prediction, find_pictures(command.prediction)
    _, model, config = load_far(command.far, command.model)
    check_backend(config, command.settings, context)
    set_backend(model, command.settings.lstm_backend)
    model.to(context.device)
    if command.fuse:
        model = fuse(model, PRECISIONS[command.fuse])
    loader = picture_loader(files, config, command.optim.batch_size, command.data.num_workers)
    autocast = command.settings.autocast(context.device)
    answers = list(predicted(model, config, loader, prediction.top, context.device, autocast))
    if prediction.output:
        write(answers, prediction.output)
        say(context, f"{len(files)} pictures: their classes are in {prediction.output}")
    else:
        say(context, as_text(answers))
