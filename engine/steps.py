"""What the modes of main.py and prune.py share: from flags to data, models and stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from datasets.classes import imagenet_names, order_classes
from datasets.loading import Data
from datasets.streams import open_data
from engine.compiling import check_compiler
from engine.distill import LOSSES, check_reach, find_loss
from engine.stages import Stage
from engine.train import make_optimizer
from models.deit import create_teacher, load_published_weights, named_teacher
from models.replace import REPLACEMENTS, FarConfig, load_model, read_config, resize, restore
from models.weights import Weights, check_named, load_teacher_weights, read, teacher_config
from utils.configs import DataConfig, FarSource, ModelConfig, ModelName, Settings
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder


def load_data(data_config: DataConfig, config: FarConfig, context: Context, trains: bool = True) -> Data:
    """The data set at a model's image size, prepared as its weights expect images.

    trains: False where the training split is not needed and may be missing.
    """
    return open_data(replace(data_config, input_size=config.img_size), context, config.reading, trains)


def load_labelled(data_config: DataConfig, config: FarConfig, context: Context, trains: bool = True) -> Data:
    """`load_data`, for what learns from labels. Raises FarError where the data set has none."""
    data = load_data(data_config, config, context, trains)
    if not data.labelled:
        raise FarError(f"--dataset {data_config.dataset}: has no labels to learn from; name a data set with classes")
    return data


def reading(config: FarConfig, data: Data) -> FarConfig:
    """The configuration with the data's preprocessing and, where it has labels, its classes."""
    return replace(config, preprocessing=data.preprocessing, classes=data.class_names or config.classes)


def read_teacher(config: ModelConfig) -> Weights | None:
    """The file of --base-weight; None where there is none, and the teacher's weights are timm's."""
    return read(config.base_weight, "--base-weight") if config.base_weight else None


def name_teacher(name: ModelName, weights: Weights | None) -> FarConfig:
    """The configuration of the teacher: by what its file says, else by the flags. num_classes 0 is no classifier.

    Raises FarError where flags and file name two models.
    """
    if weights:
        return teacher_config(weights, name)
    teacher = named_teacher(name)
    classes = imagenet_names() if teacher.published and teacher.classes == 1000 else ()
    return FarConfig(
        name.name, teacher.classes, teacher.input_size, preprocessing=teacher.preprocessing, classes=classes
    )


@torch.no_grad()
def answer_by(teacher: VisionTransformer | None, data: Data, settings: Settings, context: Context) -> None:
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
    data.answer(answers, teacher.num_classes)


def load_teacher(weights: Weights | None, config: FarConfig) -> VisionTransformer:
    """The attention model of a configuration with the weights of a file, else timm's; its classes in config's order."""
    teacher = create_teacher(config.base_model, config.num_classes, config.img_size)
    if weights:
        load_teacher_weights(teacher, weights)
        order_classes(teacher, weights.classes, config.classes, weights.source)
    else:
        load_published_weights(teacher, config.base_model)
    return teacher


def load_far(source: FarSource, model_config: ModelConfig) -> tuple[Path, VisionTransformer, FarConfig]:
    """A FAR checkpoint, which says itself which model it is, at --input-size or its own image size.

    Raises FarError where the flags name another model.
    """
    path = source.find(model_config)
    model, config = load_model(path, source.flag, model_config.drop, model_config.drop_path)
    check_named(model_config, f"{source.flag} {path}", config)
    if model_config.input_size and model_config.input_size != config.img_size:
        config = resize(model, config, model_config.input_size, f"{source.flag} {path}")
    return path, model, config


def load_best(run: RunFolder, model_config: ModelConfig, flag: str) -> VisionTransformer:
    """What a finished training handed on."""
    return load_model(run.path / "best.pth", flag, model_config.drop, model_config.drop_path)[0]


def check_backend(config: FarConfig, settings: Settings, context: Context) -> None:
    """Raises FarError where --lstm-backend cannot compute what replaces attention."""
    REPLACEMENTS[config.rep_by].check_backend(settings.lstm_backend, context.device)


def check_labels(stages: list[Stage], data: Data) -> None:
    """Raises FarError where a stage would learn from labels that the data set does not have."""
    for stage in stages:
        if not data.labelled and "labels" in find_loss(stage.loss).reads:
            useful = " or ".join(name for name, loss in LOSSES.items() if "labels" not in loss.reads)
            raise FarError(
                f"stage {stage.name}: the loss {stage.loss} reads labels, and --dataset {data.config.dataset} has "
                f"none; take {useful}"
            )


def planned(stages: list[Stage], data: Data, settings: Settings) -> list[Stage]:
    """The stages that train at all. Raises FarError where none does, or one cannot."""
    kept = [stage for stage in stages if stage.optim.epochs]
    if not kept:
        raise FarError("--epochs: every stage has 0 epochs, nothing would train; set one above 0")
    check_reach(kept)
    check_labels(kept, data)
    if settings.compile:
        check_compiler(data.context.device)
    for stage in kept:
        make_optimizer(nn.ParameterList([torch.zeros(1)]), stage.optim, 1)  # raises now, not after hours of training
        if (settings.mixup or settings.cutmix) and (least := data.smallest_batch(stage.optim.batch_size)) < 2:
            raise FarError(
                f"--mixup, --cutmix: pair the images of a step, and stage {stage.name} has steps of {least} image; "
                "raise its batch size, or switch them off"
            )
    return kept


def resumed(
    run: RunFolder, model: VisionTransformer, config: FarConfig, model_config: ModelConfig
) -> tuple[VisionTransformer, dict[str, Any] | None]:
    """The model of an interrupted run in place of the fresh one, and the content of last.pth, or None.

    Raises FarError where it learned other classes, or in another order, as earlier versions numbered them.
    """
    content = run.load_last()
    if content is not None:
        source = f"--resume {run.path / 'last.pth'}"
        stored = read_config(content, source)
        model = restore(stored, content["model"], source, model_config.drop, model_config.drop_path)
        if stored.classes and stored.classes != config.classes:
            raise FarError(f"{source}: was run with other classes, or in another order; name another --output-dir")
    return model, content
