"""What the modes of main.py and prune.py share: opening weights and data, checks before a training, the training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from datasets.classes import order_classes
from datasets.loading import Data
from datasets.streams import open_data
from engine.compiling import check_compiler
from engine.distill import LOSSES, find_loss
from engine.stages import PARTS, MakeTask, Stage
from engine.train import Trainer, make_optimizer
from models.deit import create_teacher, load_published_weights
from models.replace import REPLACEMENTS, FarConfig, load_model, read_config, resize, restore, set_backend
from models.weights import Weights, check_named, load_teacher_weights
from plots.figures import save_figure, training_curves
from utils.configs import Command, DataConfig, Settings
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder


def load_data(data_config: DataConfig, config: FarConfig, context: Context, trains: bool = True) -> Data:
    """The data set at a model's image size, prepared as its weights expect images.

    trains: False where the training split is not needed and may be missing.
    """
    return open_data(replace(data_config, input_size=config.img_size), context, config.expected_preprocessing, trains)


def check_labelled(data: Data) -> None:
    """Raises FarError where the data set has no labels."""
    if not data.labelled:
        dataset = data.config.dataset
        raise FarError(f"--dataset {dataset}: has no labels to learn from; name a data set with classes")


def with_data(config: FarConfig, data: Data) -> FarConfig:
    """The configuration with the data's preprocessing and, where it has labels, its classes."""
    return replace(config, preprocessing=data.preprocessing, classes=data.class_names or config.classes)


@torch.no_grad()
def label_by_teacher(data: Data, teacher: VisionTransformer | None, settings: Settings, context: Context) -> None:
    """Labels a data set without labels by the teacher's predictions. Raises FarError where there is no teacher."""
    if data.labelled:
        return
    if teacher is None:
        raise FarError(
            f"--dataset {data.config.dataset}: has no labels, so a teacher must answer; name its weights with "
            "--base-weight FILE"
        )
    autocast, answers = settings.autocast(context.device), []
    for images, _ in data.val_loader(64):
        with autocast():
            answers += teacher.eval().to(context.device)(images.to(context.device)).argmax(1).tolist()
    data.set_labels(answers, teacher.num_classes)


def load_teacher(weights: Weights | None, config: FarConfig) -> VisionTransformer:
    """The attention model of a configuration with the weights of a file, else timm's; its classes in config's order."""
    teacher = create_teacher(config.base_model, config.num_classes, config.img_size)
    if weights:
        load_teacher_weights(teacher, weights)
        order_classes(teacher, weights.classes, config.classes, weights.source)
    else:
        load_published_weights(teacher, config.base_model)
    return teacher


def load_far(command: Command, context: Context, flag: str, path: Path | None) -> tuple[VisionTransformer, FarConfig]:
    """The FAR checkpoint of a flag, which says itself which model it is, at --input-size or its own image size.

    Raises FarError where there is none, the flags name another model, or --lstm-backend cannot compute it.
    """
    flags, backend = command.model, command.settings.lstm_backend
    if path is None:
        raise FarError(f"{flag}: none given and PRETRAINED_PATH in main.py has none for {flags.name}; name one")
    source = f"{flag} {path}"
    model, config = load_model(path, flag, flags.drop, flags.drop_path)
    check_named(flags, source, config)
    if flags.input_size and flags.input_size != config.img_size:
        config = resize(model, config, flags.input_size, source)
    REPLACEMENTS[config.rep_by].check_backend(backend, context.device)
    set_backend(model, backend)
    return model, config


def load_best(run: RunFolder, command: Command) -> VisionTransformer:
    """What a finished training handed on."""
    flags = command.model
    model, _ = load_model(run.path / "best.pth", "--output-dir", flags.drop, flags.drop_path)
    set_backend(model, command.settings.lstm_backend)
    return model.to(run.context.device)


def check_stages(stages: list[Stage], data: Data, settings: Settings) -> None:
    """Raises FarError where a stage could not train: now, not after hours of the stages before it."""
    for stage in stages:
        reads = find_loss(stage.loss).reads
        if PARTS[stage.parts].behind and "student_logits" not in reads:
            useful = " or ".join(name for name, loss in LOSSES.items() if "student_logits" in loss.reads)
            raise FarError(
                f"stage {stage.name}: trains {stage.parts}, but the loss {stage.loss} does not reach the classifier; "
                f"take {useful} for it, or leave the classifier out (--block-ft-mode)"
            )
        if not data.labelled and "labels" in reads:
            useful = " or ".join(name for name, loss in LOSSES.items() if "labels" not in loss.reads)
            raise FarError(
                f"stage {stage.name}: the loss {stage.loss} reads labels, and --dataset {data.config.dataset} has "
                f"none; take {useful}"
            )
        make_optimizer(nn.ParameterList([torch.zeros(1)]), stage.optim, 1)
        if (settings.mixup or settings.cutmix) and (least := data.smallest_batch(stage.optim.batch_size)) < 2:
            raise FarError(
                f"--mixup, --cutmix: pair the images of a step, and stage {stage.name} has steps of {least} image; "
                "raise its batch size, or switch them off"
            )
    if settings.compile:
        check_compiler(data.context.device)


def train_stages(
    run: RunFolder,
    command: Command,
    model: VisionTransformer,
    config: FarConfig,
    stages: list[Stage],
    make_task: MakeTask,
    data: Data,
    teacher: VisionTransformer | None = None,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """Trains the stages in a run's folder, on from its last.pth where it has one. Arguments as of `Trainer`.

    Returns the model and its evaluation.
    """
    last, flags = run.load_last(), command.model
    if last is not None:
        source = f"--resume {run.path / 'last.pth'}"
        stored = read_config(last, source)
        model = restore(stored, last["model"], source, flags.drop, flags.drop_path)
    result = Trainer(model, config, stages, make_task, data, run, run.context, command.settings, last, teacher).fit()
    if run.context.main and (rows := run.rows()):
        save_figure(training_curves(rows), run.path / "curves.png")
    return model, result
