"""The steps that the modes of main.py and prune.py share: from what was asked to data, models and stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from datasets.classes import UnknownClass, imagenet_names, match_classes
from datasets.images import shown
from datasets.loading import Data
from datasets.streams import open_data
from engine.compiling import check_compiler
from engine.distill import LOSSES, check_reach, find_loss
from engine.stages import Stage
from models.deit import (
    count_answers,
    create_teacher,
    find_teacher,
    load_published_weights,
    load_teacher_weights,
    named_teacher,
)
from models.replace import REPLACEMENTS, FarConfig, load_model, read_config, resize, restore
from models.vit import classifiers
from utils.checkpoint import load
from utils.configs import DataConfig, FarSource, ModelConfig, ModelName, Settings
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder


def say(context: Context, text: str) -> None:
    if context.main:
        print(text, flush=True)


def load_data(asked: DataConfig, config: FarConfig, context: Context, trains: bool = True) -> Data:
    """The data set as a model reads it: at its image side, prepared as its weights know pictures.

    trains: whether its training split is wanted; where not, it need not be there.
    """
    return open_data(replace(asked, input_size=config.img_size), context, config.reading, trains)


def load_labelled(asked: DataConfig, config: FarConfig, context: Context, trains: bool = True) -> Data:
    """The same, for what learns from labels. Raises FarError where the data set has none."""
    data = load_data(asked, config, context, trains)
    if not data.labelled:
        raise FarError(f"--dataset {asked.dataset}: has no labels to learn from; name a data set with classes")
    return data


def reading(config: FarConfig, data: Data) -> FarConfig:
    """The configuration with how the data's pictures are prepared and, where it has labels, what its classes are."""
    return replace(config, preprocessing=data.preprocessing, classes=data.class_names or config.classes)


def holds_config(content: dict[str, Any]) -> bool:
    """Whether a file is a checkpoint of ours, which says whose weights it holds."""
    return isinstance(content.get("config"), dict) and "base_model" in content["config"]


def name_teacher(asked: ModelName, path: Path | None, flag: str = "--base-weight") -> FarConfig:
    """The teacher of a file, or of timm's weights where none is named: by what the file says, else by the flags.

    num_classes: 0 where its weights hold no classifier. Raises FarError where flags and file name two models.
    """
    source, content = f"{flag} {path}", {} if path is None else load(path, flag)
    known = count_answers(content, source) if path else None
    if holds_config(content):
        config = read_config(content, source)
        check_named(asked, path, config)
        return config
    own = named_teacher(asked)
    classes = own.classes if known is None else known
    names = imagenet_names() if path is None and own.published and classes == 1000 else ()
    return FarConfig(asked.name, classes, own.input_size, preprocessing=own.preprocessing, classes=names)


@torch.no_grad()
def answer_by(teacher: VisionTransformer | None, data: Data, settings: Settings, context: Context) -> None:
    """Where there are no labels, evaluates by the teacher's answers. Raises FarError where there is no teacher."""
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


def load_teacher(asked: ModelConfig, config: FarConfig) -> VisionTransformer:
    """The attention model with --base-weight, else timm's pretrained weights."""
    teacher = create_teacher(config.base_model, config.num_classes, config.img_size)
    if asked.base_weight:
        load_teacher_weights(teacher, asked.base_weight)
        own = name_teacher(asked, asked.base_weight).classes
        order_classes(teacher, own, config.classes, f"--base-weight {asked.base_weight}")
    else:
        load_published_weights(teacher, config.base_model)
    return teacher


def load_far(source: FarSource, asked: ModelConfig) -> tuple[Path, VisionTransformer, FarConfig]:
    """A FAR checkpoint, which knows its model by itself, at the --input-size asked for or its own.

    Raises FarError where the flags say another model.
    """
    path = source.find(asked)
    model, config = load_model(path, source.flag, asked.drop, asked.drop_path)
    check_named(asked, path, config)
    if asked.input_size and asked.input_size != config.img_size:
        config = resize(model, config, asked.input_size, f"{source.flag} {path}")
    return path, model, config


def architecture(base_model: str) -> str:
    """timm's name of it: of DeiT-Tiny, and of vit_tiny_patch16_224.augreg_in21k, whose weights are not looked at."""
    return find_teacher(base_model).architecture or base_model


def check_named(asked: ModelName, path: Path, config: FarConfig) -> None:
    """Raises FarError where the flags name another model than a file holds."""
    if asked.named is not None and (named_teacher(asked).architecture or asked.named) != architecture(
        config.base_model
    ):
        flag = "--base-model" if asked.base_model else "--scale"
        raise FarError(f"{flag}: says {asked.named}, but {path} holds a {config.base_model}; make them agree")


def load_any(asked: ModelName, path: Path, flag: str, teacher: bool) -> tuple[VisionTransformer, FarConfig]:
    """The model of a checkpoint of ours, in eval mode, and its configuration.

    teacher: or of a teacher's weights, which do not say whose they are: `asked` does.
    """
    content = load(path, flag)
    if not teacher or holds_config(content):
        model, config = restore(content, f"{flag} {path}")
        if teacher and config.replaced:
            raise FarError(f"{flag} {path}: is a FAR model, not a teacher; give it as --far-weight")
        return model, config
    config = name_teacher(asked, path, flag)
    model = create_teacher(config.base_model, max(1, config.num_classes), config.img_size)
    load_teacher_weights(model, path, flag)
    return model.eval(), config


def check_backend(config: FarConfig, settings: Settings, context: Context) -> None:
    """Raises FarError where --lstm-backend cannot compute what replaces attention."""
    REPLACEMENTS[config.rep_by].check_backend(settings.lstm_backend, context.device)


def check_classes(where: str, config: FarConfig, data: Data, mend: str) -> None:
    """Makes a data set's labels a model's: by name where both know their classes, else by number.

    A data set may have pictures of some of the classes only. Raises FarError where it has others than the model of
    `where`, a flag and its file.
    """
    name, known = data.config.dataset, config.num_classes
    if config.classes and data.names and data.config.nb_classes in (None, known):
        count = data.num_classes
        try:
            data.relabel(config.classes)
        except UnknownClass as error:
            how = "and twice" if config.classes.count(str(error)) > 1 else "but not"
            other = f"{how} {shown(error)!r}, one of the {count} that --dataset {name} has"
            raise FarError(f"{where}: knows {known} classes, {other}; {mend}") from error
        if len(data.names) < known:
            say(data.context, f"--dataset {name}: has {len(data.names)} of the {known} classes that {where} knows")
    elif data.num_classes not in (None, known):
        raise FarError(f"{where}: knows {known} classes, --dataset {name} has {data.num_classes}; {mend}")


def keeps_classifier(where: str, config: FarConfig, data: Data) -> bool:
    """Whether the classifier of the model of `where` names the data set's classes; labels are then matched by name.

    A data set of another number of classes, or with as many of other names, needs a fresh one, which is said.
    """
    try:
        if config.num_classes == data.num_classes:
            if config.classes and data.names:
                data.relabel(config.classes)
            return True
    except UnknownClass:
        pass
    others = f"the {data.num_classes} of --dataset {data.config.dataset}"
    say(data.context, f"{where}: its {config.num_classes} classes are not {others}; a fresh classifier is trained")
    return False


def order_classes(model: VisionTransformer, own: tuple[str, ...], wanted: tuple[str, ...], source: str) -> None:
    """Reorders a model's classifier, whose classes are `own`, to `wanted`; nothing where a side does not know its.

    Raises FarError naming the first class that differs.
    """
    if not (own and wanted) or own == wanted:
        return
    try:
        numbers = match_classes(own, wanted)
    except UnknownClass as error:
        where = f"{source}: does not know the class {shown(error)!r}, which the other weights or the data have"
        raise FarError(f"{where}; give weights of the same classes") from error
    with torch.no_grad():
        for head in classifiers(model):
            head.weight.copy_(head.weight[numbers])
            head.bias.copy_(head.bias[numbers])


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
        if (settings.mixup or settings.cutmix) and (least := data.smallest_batch(stage.optim.batch_size)) < 2:
            raise FarError(
                f"--mixup, --cutmix: pair the images of a step, and stage {stage.name} has steps of {least} image; "
                "raise its batch size, or switch them off"
            )
    return kept


def resumed(
    run: RunFolder, model: VisionTransformer, config: FarConfig, asked: ModelConfig
) -> tuple[VisionTransformer, dict[str, Any] | None]:
    """The model of an interrupted run in place of the fresh one, and the content of last.pth, or None.

    Raises FarError where it learned other classes, or in another order, as earlier versions numbered them.
    """
    content = run.load_last()
    if content is not None:
        source = f"--resume {run.path / 'last.pth'}"
        model, stored = restore(content, source, asked.drop, asked.drop_path)
        if stored.classes and stored.classes != config.classes:
            raise FarError(f"{source}: was run with other classes, or in another order; name another --output-dir")
    return model, content
