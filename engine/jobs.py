"""What the modes of main.py do: each makes a model, data and a list of stages, and hands them to the trainer."""

from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from datasets.loading import Data, DataConfig
from engine.distill import Distillation, check_reach, mean_similarity_of_z
from engine.evaluate import evaluate
from engine.stages import Optim, Stage, distillation
from engine.train import Settings, Trainer, check_optimizer
from models.deit import TEACHERS, create_teacher, load_published_weights, load_teacher_weights
from models.fuse import fuse
from models.replace import (
    FarConfig,
    count_parameters,
    load_model,
    parse_blocks,
    replaced_blocks,
    reset_classifier,
    restore,
    set_backend,
)
from utils import arguments
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run

FUSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Paths = tuple[dict[str, str], dict[str, str]]


def optim_from(args: Namespace, prefix: str, context: Context) -> Optim:
    """One family of optimiser flags, rates scaled by the global batch / 512 (linear scaling, as in DeiT)."""

    def get(name: str):
        return getattr(args, prefix + name)

    scale = 1.0 if args.unscale_lr else get("batch_size") * context.world * get("accum_steps") / 512
    names = (
        "epochs",
        "batch_size",
        "warmup_epochs",
        "sched",
        "opt",
        "momentum",
        "weight_decay",
        "clip_grad",
        "accum_steps",
    )
    rates = {name: get(name) * scale for name in ("lr", "warmup_lr", "min_lr")}
    optim = Optim(**{name: get(name) for name in names}, **rates)
    check_optimizer(optim, f"--{prefix.replace('_', '-')}opt", context.device)
    return optim


def settings_from(args: Namespace) -> Settings:
    return Settings(
        args.seed, args.amp, args.smoothing, args.mixup, args.cutmix, args.select, args.rep_init, args.lstm_backend
    )


def data_from(args: Namespace, input_size: int, context: Context) -> Data:
    return Data(
        DataConfig(
            args.dataset,
            args.data_path or Path("data") / args.dataset,
            input_size,
            args.download,
            args.train_subset,
            args.holdout,
            args.color_jitter,
            args.aa,
            args.train_interpolation,
            args.reprob,
            args.remode,
            args.recount,
            args.eval_crop_ratio,
            args.repeated_aug,
            args.num_workers,
            args.seed,
        ),
        context,
    )


def planned(stages: list[Stage], data: Data, settings: Settings) -> list[Stage]:
    """The stages that train at all. Raises FarError where none does, or one cannot."""
    kept = [stage for stage in stages if stage.optim.epochs]
    if not kept:
        raise FarError("--epochs: every stage has 0 epochs, nothing would train; set one above 0")
    check_reach(kept)
    for stage in kept:
        if (settings.mixup or settings.cutmix) and (least := data.smallest_batch(stage.optim.batch_size)) < 2:
            raise FarError(
                f"--mixup, --cutmix: pair the images of a step, and stage {stage.name} has steps of {least} image; "
                "raise its batch size, or switch them off"
            )
    return kept


def say(context: Context, text: str) -> None:
    if context.main:
        print(text, flush=True)


def from_last(args: Namespace, run: RunFolder, model, config: FarConfig):
    """The model of an interrupted run in place of the fresh one. Returns (model, content of last.pth or None)."""
    content = run.load_last()
    if content is None:
        return model, None
    return restore(content, f"--resume {run.path / 'last.pth'}", args.drop, args.drop_path)[0], content


def load_teacher(args: Namespace, config: FarConfig):
    """The attention model with --base-weight, else timm's pretrained weights."""
    teacher = create_teacher(config.base_model, config.num_classes, config.img_size)
    if args.base_weight:
        load_teacher_weights(teacher, args.base_weight)
    else:
        load_published_weights(teacher, config.base_model)
    return teacher


def start(args: Namespace, context: Context) -> tuple[Data, FarConfig]:
    """Data first (its class count shapes the model), then the configuration the flags describe."""
    torch.manual_seed(args.seed)
    base_model = arguments.choose_model(args)
    size = args.input_size or TEACHERS[base_model].input_size
    data = data_from(args, size, context)
    return data, FarConfig(base_model, data.num_classes, size, args.rep_by)


def finish(run: RunFolder, model, result: dict[str, float], context: Context, **more) -> dict[str, float]:
    run.write_json("result.json", {**result, "parameters": count_parameters(model), **more})
    say(
        context,
        f"top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images; weights in {run.path / 'best.pth'}",
    )
    return result


def train_on_labels(args: Namespace, context: Context, model, config: FarConfig, stage: Stage, data: Data) -> None:
    """A run of one stage that needs no teacher."""
    stages = planned([stage], data, settings_from(args))
    with open_run(vars(args), args.mode, context) as run:
        model, last = from_last(args, run, model, config)

        def task(stage: Stage, criterion) -> Distillation:
            return Distillation(model, None, stage, criterion)

        finish(
            run,
            model,
            Trainer(model, config, stages, task, data, run, context, settings_from(args), last).fit(),
            context,
        )


def teacher(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode teacher: trains the attention model itself, from --base-weight where given."""
    data, config = start(args, context)
    model = create_teacher(config.base_model, config.num_classes, config.img_size, args.drop, args.drop_path)
    if args.base_weight and not load_teacher_weights(model, args.base_weight, head=False):
        say(
            context, f"--base-weight {args.base_weight}: its classifier has another class count; a fresh one is trained"
        )
    stage = Stage("teacher", (), (), "full", "classification", "output", optim_from(args, "", context))
    train_on_labels(args, context, model, config, stage, data)


def train(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode train and block-distill: swap, then the stages of distillation."""
    data, config = start(args, context)
    reference = load_teacher(args, config)
    blocks = parse_blocks(args.replace, len(reference.blocks))
    skip = args.skip_train_attn or args.mode == "block-distill"
    if args.attn_weight:
        model, config = load_model(args.attn_weight, "--attn-weight", args.drop, args.drop_path)
        check_same(args, config, data, blocks, replaced_blocks(model))
    else:
        model = create_teacher(config.base_model, config.num_classes, config.img_size, args.drop, args.drop_path)
        model.load_state_dict(reference.state_dict())
        if skip:
            say(context, "no --attn-weight: the block stage starts from fresh modules")
    block = optim_from(args, "block_ft_", context)
    stages = distillation(
        blocks,
        args.train_mode,
        args.step,
        None if skip else optim_from(args, "", context),
        args.train_loss,
        block,
        args.block_ft_train_loss,
        args.block_ft_mode,
        block if args.finetune_head else None,
        bool(args.attn_weight),
    )
    stages = planned(stages, data, settings_from(args))
    with open_run(vars(args), args.mode, context) as run:
        model, last = from_last(args, run, model, config)
        reference.to(context.device)

        def task(stage: Stage, criterion) -> Distillation:
            return Distillation(model, reference, stage, criterion, args.distill_input)

        result = Trainer(model, config, stages, task, data, run, context, settings_from(args), last).fit()
        loader = data.val_loader(block.batch_size)
        z = mean_similarity_of_z(model, reference, loader, blocks, context)
        expected = evaluate(reference, loader, context, settings_from(args).autocast(context.device))
        finish(run, model, result, context, teacher_acc1=expected["acc1"], z_similarity=z)
    say(context, f"its teacher: top-1 {expected['acc1']:.2f}")


def check_same(args: Namespace, config: FarConfig, data: Data, asked: tuple[int, ...], found: tuple[int, ...]) -> None:
    """--attn-weight must be what the other flags describe."""
    wanted = FarConfig(arguments.choose_model(args), data.num_classes, config.img_size, args.rep_by)
    for flag, ours, theirs in (
        ("--base-model", wanted.base_model, config.base_model),
        ("--dataset", f"{wanted.num_classes} classes", f"{config.num_classes} classes"),
        ("--rep-by", wanted.rep_by, config.rep_by),
        ("--replace", list(asked), list(found)),
        ("--input-size", args.input_size or config.img_size, config.img_size),
    ):
        if ours != theirs:
            raise FarError(
                f"--attn-weight {args.attn_weight}: has {flag} {theirs}, the flags say {ours}; make them agree"
            )


def find_far_weight(args: Namespace, paths: Paths) -> Path:
    """--far-weight, else the entry of the dictionary that --ds-pruned names, else the other's."""
    if args.far_weight:
        return args.far_weight
    scale = arguments.choose_model(args).removeprefix("DeiT-")
    plain, pruned = (table.get(scale, "") for table in paths)
    found = (pruned or plain) if args.ds_pruned else (plain or pruned)
    if not found:
        raise FarError(
            f"--far-weight: none given and PRETRAINED_PATH[{scale!r}] in main.py is empty; name a FAR checkpoint"
        )
    return Path(found)


def load_far(args: Namespace, paths: Paths):
    path = find_far_weight(args, paths)
    model, config = load_model(path, "--far-weight", args.drop, args.drop_path)
    if not config.replaced:
        raise FarError(
            f"--far-weight {path}: holds a teacher, no block of it is replaced; evaluate it as --base-weight, or "
            "move it with --mode teacher --base-weight"
        )
    if args.ds_pruned and not config.pruned:
        raise FarError(f"--ds-pruned: {path} holds an unpruned model; leave the flag out or name a pruned checkpoint")
    if (args.base_model or args.scale) and (asked := arguments.choose_model(args)) != config.base_model:
        flag = "--base-model" if args.base_model else "--scale"
        raise FarError(f"{flag}: says {asked}, but {path} holds a {config.base_model}; make them agree")
    if args.input_size and args.input_size != config.img_size:
        raise FarError(f"--input-size {args.input_size}: {path} was trained at {config.img_size}; leave the flag out")
    return model, config


def downstream(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode downstream: a FAR model on another label set, with a fresh classifier where the class count differs."""
    torch.manual_seed(args.seed)
    model, config = load_far(args, paths)
    data = data_from(args, config.img_size, context)
    if data.num_classes != config.num_classes:
        reset_classifier(model, data.num_classes, torch.Generator().manual_seed(args.seed))
        config = replace(config, num_classes=data.num_classes)
        if args.ds_mode == "FC":
            say(context, "--ds-mode FC: the classifier is fresh and does not train; FC+head would train it")
    blocks = tuple(range(len(model.blocks)))
    stage = Stage("downstream", (), blocks, args.ds_mode, "classification", "output", optim_from(args, "", context))
    train_on_labels(args, context, model, config, stage, data)


def eval_mode(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode eval: a FAR checkpoint, or with --base-weight a teacher."""
    if args.base_weight and not args.far_weight:
        data, config = start(args, context)
        model, path = load_teacher(args, config), args.base_weight
    else:
        model, config = load_far(args, paths)
        path, data = find_far_weight(args, paths), data_from(args, config.img_size, context)
        if data.num_classes != config.num_classes:
            raise FarError(
                f"--far-weight {path}: knows {config.num_classes} classes, --dataset {args.dataset} has "
                f"{data.num_classes}; move it there with --mode downstream"
            )
    set_backend(model, args.lstm_backend)
    parameters = count_parameters(model)
    model.to(context.device)
    if args.fuse:
        fuse(model, FUSE[args.fuse])
    autocast = settings_from(args).autocast(context.device)
    with open_run(vars(args), args.mode, context) if args.output_dir else nullcontext() as run:
        result = evaluate(model, data.val_loader(args.batch_size), context, autocast)
        result["parameters"] = parameters
        if run:
            run.write_json("result.json", result)
    say(
        context,
        f"{path}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images, {result['parameters']:,} parameters",
    )
