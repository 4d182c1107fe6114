"""The modes of main.py: each turns flags into a model, data and a list of stages, and hands them to the trainer."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from datasets.loading import Data, DataConfig
from datasets.registry import SOURCES
from engine.distill import LOSSES, Distillation, check_reach, mean_similarity_of_z
from engine.evaluate import evaluate
from engine.stages import Optim, Stage, distillation
from engine.train import AMP, Settings, Trainer, check_optimizer
from models.bilstm import REPLACEMENTS
from models.deit import INPUT_SIZE, SCALES, TEACHERS, create_teacher, load_published_weights, load_teacher_weights
from models.fuse import fuse
from models.kernels import BACKENDS
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
from utils.arguments import Parser
from utils.distributed import Context
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run

FUSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Paths = tuple[dict[str, str], dict[str, str]]


def build_parser(description: str) -> Parser:
    parser = Parser(description=description)
    parser.add_argument("--mode", choices=tuple(JOBS), default="train", help="what to do")
    arguments.add_run_group(parser, BACKENDS, tuple(AMP))
    arguments.add_model_group(parser, TEACHERS, SCALES, REPLACEMENTS)
    arguments.add_data_group(parser, SOURCES)
    g = parser.add_argument_group("distillation")
    g.add_argument("--train-loss", choices=tuple(LOSSES), default="combine", help="loss of the attention stage")
    g.add_argument("--block-ft-train-loss", choices=tuple(LOSSES), default="classification", help="loss of the block stage")
    g.add_argument("--block-ft-mode", choices=("block", "FC", "FC+head"), default="block", help="what the block stage trains")
    g.add_argument("--train-mode", choices=("parallel", "sequential"), default="sequential",
                   help="all replaced blocks at once, or --step at a time, front to back")  # fmt: skip
    g.add_argument("--step", type=arguments.SIZE, default=12, help="blocks a step of sequential training")
    g.add_argument("--distill-input", choices=("teacher", "student"), default="student",
                   help="what a student block reads: the teacher's input to it, or the student's running state")  # fmt: skip
    g.add_argument("--skip-train-attn", action="store_true", help="go straight to the block stage")
    g.add_argument("--attn-weight", type=arguments.path, metavar="FILE", help="FAR weights to start from, after the attention stage")
    g.add_argument("--finetune-head", action="store_true", help="then train the classifier alone, with the block-ft flags")
    g = parser.add_argument_group("FAR model")
    g.add_argument("--far-weight", type=arguments.path, metavar="FILE", help="FAR checkpoint; default: PRETRAINED_PATH in main.py")
    g.add_argument("--fuse", choices=tuple(FUSE), help="eval: merge neighbouring linear maps, recurrent weights in this precision")
    g.add_argument("--ds-pruned", action="store_true", help="start from the pruned model, PRETRAINED_PATH_PRUNE")
    g.add_argument("--ds-mode", choices=("full", "FC", "FC+head"), default="full", help="what downstream trains")
    arguments.add_optim_group(parser, "optimisation", "", 200, 5e-4, 1e-5)
    arguments.add_optim_group(parser, "optimisation of the block stage", "block-ft-", 100, 5e-5, 1e-6)
    g = parser.add_argument_group("rates")
    g.add_argument("--unscale-lr", action="store_true", help="take rates as given, not times global batch / 512")
    return parser


def parse(parser: Parser, argv: list[str] | None) -> Namespace:
    """The flags. Ends with one line where the mode would ignore one, or two contradict each other."""
    args = parser.parse_args(argv)
    job = JOBS[args.mode]
    read = parser.titled(job.groups) - job.ignores | job.reads | {"mode", "help"}
    parser.refuse(argv, {action.dest for action in parser._actions} - read, f"--mode {args.mode} does not use it")
    if args.mode == "eval" and args.base_weight:
        parser.refuse(argv, ("far_weight", "ds_pruned"), "--base-weight names the model already")
    arguments.check_run(args)
    return args


def optim_from(args: Namespace, prefix: str, context: Context) -> Optim:
    """One family of optimiser flags, rates scaled by the global batch / 512 (linear scaling, as in DeiT)."""

    def get(name: str):
        return getattr(args, prefix + name)

    scale = 1.0 if args.unscale_lr else get("batch_size") * context.world * get("accum_steps") / 512
    names = ("epochs", "batch_size", "warmup_epochs", "sched", "opt", "momentum", "weight_decay", "clip_grad", "accum_steps")
    rates = {name: get(name) * scale for name in ("lr", "warmup_lr", "min_lr")}
    optim = Optim(**{name: get(name) for name in names}, **rates)
    check_optimizer(optim, f"--{prefix.replace('_', '-')}opt", context.device)
    return optim


def settings_from(args: Namespace) -> Settings:
    return Settings(args.seed, args.amp, args.smoothing, args.mixup, args.cutmix, args.select, args.rep_init, args.lstm_backend)


def data_from(args: Namespace, input_size: int, context: Context) -> Data:
    return Data(DataConfig(
        args.dataset, args.data_path or Path("data") / args.dataset, input_size, args.download, args.train_subset, args.holdout,
        args.color_jitter, args.aa, args.train_interpolation, args.reprob, args.remode, args.recount, args.eval_crop_ratio,
        args.repeated_aug, args.num_workers, args.seed,
    ), context)  # fmt: skip


def planned(stages: list[Stage], data: Data, settings: Settings) -> list[Stage]:
    """The stages that train at all. Raises FarError where none does, or one cannot."""
    kept = [stage for stage in stages if stage.optim.epochs]
    if not kept:
        raise FarError("--epochs: every stage has 0 epochs, nothing would train; set one above 0")
    check_reach(kept)
    for stage in kept:
        if (settings.mixup or settings.cutmix) and (least := data.smallest_batch(stage.optim.batch_size)) < 2:
            raise FarError(f"--mixup, --cutmix: pair the images of a step, and stage {stage.name} has steps of {least} image; "
                           "raise its batch size, or switch them off")  # fmt: skip
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
    base_model = arguments.choose_model(args, SCALES)
    size = args.input_size or INPUT_SIZE[base_model]
    data = data_from(args, size, context)
    return data, FarConfig(base_model, data.num_classes, size, args.rep_by)


def finish(run: RunFolder, model, result: dict[str, float], context: Context, **more) -> dict[str, float]:
    run.write_json("result.json", {**result, "parameters": count_parameters(model), **more})
    say(context, f"top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
                 f"on {result['images']} images; weights in {run.path / 'best.pth'}")  # fmt: skip
    return result


def classify(stage: Stage, criterion, model) -> Distillation:
    return Distillation(model, None, stage, criterion)


def teacher(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode teacher: trains the attention model itself, from --base-weight where given."""
    data, config = start(args, context)
    model = create_teacher(config.base_model, config.num_classes, config.img_size, args.drop, args.drop_path)
    if args.base_weight and not load_teacher_weights(model, args.base_weight, head=False):
        say(context, f"--base-weight {args.base_weight}: its classifier has another class count; a fresh one is trained")
    stages = [Stage("teacher", (), (), "full", "classification", "output", optim_from(args, "", context))]
    stages = planned(stages, data, settings_from(args))
    with open_run(vars(args), args.mode, context) as run:
        model, last = from_last(args, run, model, config)
        task = partial(classify, model=model)
        finish(run, model, Trainer(model, config, stages, task, data, run, context, settings_from(args), last).fit(), context)


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
        blocks, args.train_mode, args.step, None if skip else optim_from(args, "", context), args.train_loss, block,
        args.block_ft_train_loss, args.block_ft_mode, block if args.finetune_head else None, bool(args.attn_weight),
    )  # fmt: skip
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
    wanted = FarConfig(arguments.choose_model(args, SCALES), data.num_classes, config.img_size, args.rep_by)
    for flag, ours, theirs in (
        ("--base-model", wanted.base_model, config.base_model),
        ("--dataset", f"{wanted.num_classes} classes", f"{config.num_classes} classes"),
        ("--rep-by", wanted.rep_by, config.rep_by),
        ("--replace", list(asked), list(found)),
        ("--input-size", args.input_size or config.img_size, config.img_size),
    ):
        if ours != theirs:
            raise FarError(f"--attn-weight {args.attn_weight}: has {flag} {theirs}, the flags say {ours}; make them agree")


def find_far_weight(args: Namespace, paths: Paths) -> Path:
    """--far-weight, else the entry of the dictionary that --ds-pruned names, else the other's."""
    if args.far_weight:
        return args.far_weight
    scale = arguments.choose_model(args, SCALES).removeprefix("DeiT-")
    plain, pruned = (table.get(scale, "") for table in paths)
    found = (pruned or plain) if args.ds_pruned else (plain or pruned)
    if not found:
        raise FarError(f"--far-weight: none given and PRETRAINED_PATH[{scale!r}] in main.py is empty; name a FAR checkpoint")
    return Path(found)


def load_far(args: Namespace, paths: Paths):
    path = find_far_weight(args, paths)
    model, config = load_model(path, "--far-weight", args.drop, args.drop_path)
    if not config.replaced:
        raise FarError(f"--far-weight {path}: holds a teacher, no block of it is replaced; evaluate it as --base-weight, or "
                       "move it with --mode teacher --base-weight")  # fmt: skip
    if args.ds_pruned and not config.pruned:
        raise FarError(f"--ds-pruned: {path} holds an unpruned model; leave the flag out or name a pruned checkpoint")
    if (args.base_model or args.scale) and (asked := arguments.choose_model(args, SCALES)) != config.base_model:
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
    stages = [Stage("downstream", (), blocks, args.ds_mode, "classification", "output", optim_from(args, "", context))]
    stages = planned(stages, data, settings_from(args))
    with open_run(vars(args), args.mode, context) as run:
        model, last = from_last(args, run, model, config)
        task = partial(classify, model=model)
        finish(run, model, Trainer(model, config, stages, task, data, run, context, settings_from(args), last).fit(), context)


def eval_mode(args: Namespace, context: Context, paths: Paths) -> None:
    """--mode eval: a FAR checkpoint, or with --base-weight a teacher."""
    if args.base_weight and not args.far_weight:
        data, config = start(args, context)
        model, path = load_teacher(args, config), args.base_weight
    else:
        model, config = load_far(args, paths)
        path, data = find_far_weight(args, paths), data_from(args, config.img_size, context)
        if data.num_classes != config.num_classes:
            raise FarError(f"--far-weight {path}: knows {config.num_classes} classes, --dataset {args.dataset} has "
                           f"{data.num_classes}; move it there with --mode downstream")  # fmt: skip
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
    say(context, f"{path}: top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
                 f"on {result['images']} images, {result['parameters']:,} parameters")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A mode: what it does, and the flags it reads: groups of them, some of those left out, some others besides."""

    run: Callable[[Namespace, Context, Paths], None]
    groups: frozenset[str]
    ignores: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()


_TRAINING = frozenset({"run", "model", "student", "data", "augmentation", "rates"})
_DISTILLING = _TRAINING | {"replacement", "distillation", "optimisation of the block stage"}
JOBS: dict[str, Job] = {
    "teacher": Job(teacher, _TRAINING | {"optimisation"}),
    "train": Job(train, _DISTILLING | {"optimisation"}),
    "block-distill": Job(train, _DISTILLING, frozenset({"train_loss"})),
    "downstream": Job(downstream, _TRAINING | {"optimisation", "FAR model"}, frozenset({"base_weight", "fuse"})),
    "eval": Job(
        eval_mode, frozenset({"run", "model", "data", "FAR model"}), frozenset({"resume", "select", "ds_mode"}), frozenset({"batch_size"})
    ),
}
