"""The modes of main.py: each opens weights and data, lists its stages, trains and reports."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from datasets.classes import check_classes, keeps_classifier, order_classes
from datasets.loading import Data
from deploy.fuse import fuse
from deploy.predict import as_text, find_pictures, picture_loader, write
from deploy.predict import predict as predicted
from engine.distill import Distillation
from engine.evaluate import evaluate
from engine.fidelity import fidelity, summary
from engine.plan import show_plan
from engine.stages import Stage, distillation
from engine.steps import (
    answer_by,
    check_backend,
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
from plots.figures import draw_curves
from utils.configs import ModeCommand, ModelConfig
from utils.distributed import Context, say
from utils.errors import FarError
from utils.run_folder import open_run

FUSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
) -> dict[str, Any] | None:
    """Trains the stages in the run's folder and reports on the model that they hand on; --dry-run only says what would.

    reference: the teacher, where the stages distil from one; the report then tells how close the model is to it.
    Returns the report.
    """

    def make_task(model: VisionTransformer, stage: Stage, criterion: nn.Module) -> nn.Module:
        return Distillation(model, reference, stage, criterion, command.distill_input)

    settings = command.settings
    stages = planned(stages, data, settings)
    if command.run.dry_run:
        show_plan(model, config, stages, make_task, data, command.run, context, settings)
        return None
    with open_run(command.run, context, data.fingerprint) as run:
        model, last = resumed(run, model, config, command.model)
        if reference is not None:
            reference.to(context.device)
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
    data, known, weights = start(command, context)
    config = taught(command, known, data)
    check_backend(config, command.settings, context)
    reference = load_teacher(weights, config)
    answer_by(reference, data, command.settings, context)
    blocks = parse_blocks(command.replace, len(reference.blocks))
    model, config = student(command, context, reference, config, blocks)
    block = command.scaled(command.block_ft_optim, context.world)
    attn = None if command.plan.skip_train_attn else command.scaled(command.optim, context.world)
    stages = distillation(blocks, command.plan, attn, block)
    result = run_stages(command, context, model, config, stages, data, reference)
    if result:
        say(context, f"its teacher: top-1 {result['teacher_acc1']:.2f}; the student {summary(result)}")


def student(
    command: ModeCommand, context: Context, reference: VisionTransformer, config: FarConfig, blocks: tuple[int, ...]
) -> tuple[VisionTransformer, FarConfig]:
    """The model that distillation starts from: --attn-weight, else the teacher's weights, to be swapped."""
    model_config, weight = command.model, command.plan.attn_weight
    if weight:
        model, stored = load_model(weight, "--attn-weight", model_config.drop, model_config.drop_path)
        if stored.num_classes == config.num_classes:
            order_classes(model, stored.classes, config.classes, f"--attn-weight {weight}")
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
        model = fuse(model, FUSE[command.fuse])
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
        model = fuse(model, FUSE[command.fuse])
    loader = picture_loader(files, config, command.optim.batch_size, command.data.num_workers)
    autocast = command.settings.autocast(context.device)
    answers = list(predicted(model, config, loader, prediction.top, context.device, autocast))
    if prediction.output:
        write(answers, prediction.output)
        say(context, f"{len(files)} pictures: their classes are in {prediction.output}")
    else:
        say(context, as_text(answers))
