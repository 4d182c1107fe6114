"""What the modes of main.py do: each makes data, a model and a list of stages, and hands them to the trainer."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from datasets.loading import Data
from deploy.fuse import fuse
from deploy.predict import as_text, find_pictures, picture_loader, write
from deploy.predict import predict as predicted
from engine.choosing import settle
from engine.distill import Distillation
from engine.evaluate import evaluate
from engine.fidelity import fidelity, summary
from engine.plan import show_plan
from engine.stages import Stage, distillation
from engine.steps import (
    answer_by,
    check_backend,
    check_classes,
    keeps_classifier,
    load_data,
    load_far,
    load_labelled,
    load_teacher,
    name_teacher,
    order_classes,
    planned,
    reading,
    resumed,
    say,
)
from engine.train import Trainer
from models.deit import check_size, create_teacher, load_teacher_weights
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
from plots.figures import draw_curves
from utils.configs import ModeCommand, ModelConfig
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run

FUSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def start(command: ModeCommand, context: Context, load=load_data, trains: bool = True) -> tuple[Data, FarConfig]:
    """The data, and the configuration of the teacher that its weights and the flags describe."""
    torch.manual_seed(command.settings.seed)
    asked = command.model
    known = name_teacher(asked, asked.base_weight)
    known = replace(known, rep_by=asked.rep_by, img_size=asked.input_size or known.img_size)
    check_size(known.base_model, known.img_size)
    return load(command.data, known, context, trains), known


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


def fresh(asked: ModelConfig, config: FarConfig) -> VisionTransformer:
    return create_teacher(config.base_model, config.num_classes, config.img_size, asked.drop, asked.drop_path)


def finish(run: RunFolder, model, result: dict[str, Any], context: Context) -> None:
    run.write_json("result.json", {**result, "parameters": count_parameters(model)})
    say(
        context,
        f"top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images; weights in {run.path / 'best.pth'}",
    )


def train_on_labels(command: ModeCommand, context: Context, model, config: FarConfig, stage: Stage, data: Data) -> None:
    """A run of one stage that needs no teacher."""
    stages = planned([stage], data, command.settings)
    if command.run.dry_run:
        task = partial(Distillation, model, None)
        show_plan(model, config, stages, task, data, command.run, context, command.settings)
        return
    with open_run(command.run, context, data.fingerprint) as run:
        model, last = resumed(run, model, config, command.model)
        task = partial(Distillation, model, None)
        Trainer(model, config, stages, task, data, run, context, command.settings, last).fit()
        draw_curves(run)
        loader = data.val_loader(stage.optim.batch_size)
        result = evaluate(model, loader, context, command.settings.autocast(context.device))
        finish(run, model, result, context)


def teacher(command: ModeCommand, context: Context) -> None:
    """--mode teacher: trains the attention model itself, from --base-weight where given."""
    data, known = start(command, context, load_labelled)
    weight = command.model.base_weight
    keeps = bool(weight) and keeps_classifier(f"--base-weight {weight}", known, data)
    if not keeps:
        known = replace(known, num_classes=data.num_classes, classes=())
    config = reading(known, data)
    model = fresh(command.model, config)
    if weight:
        load_teacher_weights(model, weight, keep_head=keeps)
    stage = Stage("teacher", (), (), "full", "classification", "output", command.scaled(command.optim, context.world))
    train_on_labels(command, context, model, config, stage, data)


def train(command: ModeCommand, context: Context) -> None:
    """--mode train and block-distill: swap, then the stages of distillation."""
    data, known = start(command, context)
    config = taught(command, known, data)
    check_backend(config, command.settings, context)
    reference = load_teacher(command.model, config)
    answer_by(reference, data, command.settings, context)
    blocks = parse_blocks(command.replace, len(reference.blocks))
    model, config = student(command, context, reference, config, blocks)
    block = command.scaled(command.block_ft_optim, context.world)
    attn = None if command.plan.skip_train_attn else command.scaled(command.optim, context.world)
    settings = command.settings
    stages = planned(distillation(blocks, command.plan, attn, block), data, settings)
    if command.run.dry_run:
        task = partial(Distillation, model, reference, distill_input=command.distill_input)
        show_plan(model, config, stages, task, data, command.run, context, settings)
        return
    with open_run(command.run, context, data.fingerprint) as run:
        model, last = resumed(run, model, config, command.model)
        reference.to(context.device)

        task = partial(Distillation, model, reference, distill_input=command.distill_input)
        Trainer(model, config, stages, task, data, run, context, settings, last).fit()
        draw_curves(run)
        loader = data.val_loader(block.batch_size)
        kept = fidelity(model, reference, loader, context, settings.autocast(context.device))
        finish(run, model, kept, context)
    say(context, f"its teacher: top-1 {kept['teacher_acc1']:.2f}; the student {summary(kept)}")


def student(
    command: ModeCommand, context: Context, reference: VisionTransformer, config: FarConfig, blocks: tuple[int, ...]
) -> tuple[VisionTransformer, FarConfig]:
    """The model that distillation starts from: --attn-weight, else the teacher's weights, to be swapped."""
    asked, weight = command.model, command.plan.attn_weight
    if weight:
        model, found = load_model(weight, "--attn-weight", asked.drop, asked.drop_path)
        if found.num_classes == config.num_classes:
            order_classes(model, found.classes, config.classes, f"--attn-weight {weight}")
        found = replace(found, preprocessing=config.preprocessing, classes=config.classes or found.classes)
        check_same(weight, replace(config, replaced=blocks), replace(found, replaced=replaced_blocks(model)))
        if found.img_size != config.img_size:
            say(context, f"--attn-weight {weight}: its positions go from {found.img_size} to {config.img_size} px")
            found = resize(model, found, config.img_size, f"--attn-weight {weight}")
        return model, found
    model = fresh(asked, config)
    model.load_state_dict(reference.state_dict())
    if command.plan.skip_train_attn:
        say(context, "no --attn-weight: the block stage starts from fresh modules")
    return model, config


def check_same(weight: Path, wanted: FarConfig, found: FarConfig) -> None:
    """--attn-weight must be what the other flags describe."""
    for flag, ours, theirs in (
        ("--base-model", wanted.base_model, found.base_model),
        ("--dataset", f"{wanted.num_classes} classes", f"{found.num_classes} classes"),
        ("--rep-by", wanted.rep_by, found.rep_by),
        ("--replace", list(wanted.replaced), list(found.replaced)),
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
    train_on_labels(command, context, model, config, stage, data)


def load_evaluated(command: ModeCommand, context: Context):
    """What eval reads: (the weights' file, the model, the teacher that it is compared with or None, the data)."""
    asked = command.model
    if not (command.far.path or command.ds_pruned) and asked.base_weight:
        data, known = start(command, context, load_labelled, trains=False)
        return asked.base_weight, load_teacher(asked, taught(command, known, data)), None, data
    path, model, config = load_start(command, context)
    data = load_data(command.data, config, context, trains=False)
    check_classes(f"--far-weight {path}", config, data, "move it there with --mode downstream")
    return path, model, load_teacher(asked, config) if asked.base_weight else None, data


def eval_mode(command: ModeCommand, context: Context) -> None:
    """--mode eval: a FAR checkpoint, compared with the teacher where --base-weight names one; or a teacher alone."""
    path, model, reference, data = load_evaluated(command, context)
    answer_by(reference, data, command.settings, context)
    parameters = count_parameters(model)
    model.to(context.device)
    settle(model, command.settings.lstm_backend, command.optim.batch_size, context, learns=False)
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
    asked, files = command.prediction, find_pictures(command.prediction)
    _, model, config = load_far(command.far, command.model)
    check_backend(config, command.settings, context)
    set_backend(model, command.settings.lstm_backend)
    model.to(context.device)
    if command.fuse:
        model = fuse(model, FUSE[command.fuse])
    loader = picture_loader(files, config, command.optim.batch_size, command.data.num_workers)
    autocast = command.settings.autocast(context.device)
    answers = list(predicted(model, config, loader, asked.top, context.device, autocast))
    if asked.output:
        write(answers, asked.output)
        say(context, f"{len(files)} pictures: their classes are in {asked.output}")
    else:
        say(context, as_text(answers))
