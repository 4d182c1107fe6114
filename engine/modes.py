"""The modes of main.py: each opens weights and data, lists its stages, trains and reports."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from datasets.classes import check_classes, imagenet_names, keeps_classifier, order_classes
from datasets.loading import Data
from deploy.fuse import fuse
from deploy.packed import PRECISIONS
from deploy.predict import as_text, find_pictures, picture_loader, write
from deploy.predict import predict as predicted
from engine.distill import Distillation
from engine.dry_run import show_dry_run
from engine.evaluate import evaluate
from engine.fidelity import fidelity, summary
from engine.ranking import ASIDE, RANKING_FILE, Hybrids, block_by_block, rank_blocks, read_ranking, terms_of_blocks
from engine.stages import MakeTask, Stage, distillation
from engine.steps import (
    check_labelled,
    check_stages,
    label_by_teacher,
    load_best,
    load_data,
    load_far,
    load_teacher,
    train_stages,
    with_data,
)
from models.choosing import choose_kernels
from models.deit import check_size, create_teacher, named_teacher
from models.replace import (
    REPLACEMENTS,
    FarConfig,
    count_parameters,
    load_model,
    parse_blocks,
    replacements,
    reset_classifier,
    resize,
)
from models.weights import Weights, load_teacher_weights, read, teacher_config
from plots.figures import cost_of_blocks, save_figure
from utils.configs import ModeCommand, ModelConfig, Settings
from utils.distributed import Context, say
from utils.errors import FarError
from utils.run_folder import RunFolder, open_run


def train(command: ModeCommand, context: Context) -> None:
    """--mode train and block-distill: the teacher's attention is replaced, then distilled into, stage by stage.

    With --replace auto the attention stages train every block, and `choose_blocks` keeps the cheapest for the others.
    """
    torch.manual_seed(command.settings.seed)
    plan = command.plan
    if command.ranks:
        command = prepare_ranking(command)
    teacher, config, data = open_teacher(command, context)
    REPLACEMENTS[config.rep_by].check_backend(command.settings.lstm_backend, context.device)
    label_by_teacher(data, teacher, command.settings, context)
    depth = len(teacher.blocks)
    if command.keep and command.keep > depth:
        raise FarError(f"--replace auto:{command.keep}: this model has {depth} blocks; give a smaller number")
    blocks = parse_blocks("all" if command.ranks else command.replace, depth)
    student, config = open_student(command, context, teacher, config, blocks)

    block = command.scaled(command.block_ft_optim, context.world)
    attn = None if plan.skip_train_attn else command.scaled(command.optim, context.world)
    stages = distillation(blocks, plan, attn, block)
    if command.ranks:
        attn_stages = [block_by_block(stage) for stage in stages if stage.parts == "mixing"]
        stages = [*attn_stages, *distillation(blocks[: command.keep], plan, None, block)]
    stages = those_that_train(stages, data, command.settings)
    make_task = partial(Distillation, teacher=teacher, distill_input=command.distill_input)
    if command.run.dry_run:
        auto = ()
        if command.ranks:
            folder = ", attn/" if stages[0].parts == "mixing" else ""
            auto = f", {RANKING_FILE}, ranking.png{folder}", copy_of(teacher, command.model, config)
        show_dry_run(command, student, config, stages, make_task, data, *auto)
        return
    with open_run(command.run, context, data.fingerprint) as run:
        teacher.to(context.device)
        if command.ranks:
            student, stages = choose_blocks(run, command, student, config, stages, data, teacher)
        result = train_and_report(run, command, student, config, stages, make_task, data, teacher)
    say(context, f"its teacher: top-1 {result['teacher_acc1']:.2f}; the student {summary(result)}")


def open_weights(command: ModeCommand, context: Context, trains: bool = True) -> tuple[Weights | None, FarConfig, Data]:
    """--base-weight's file (None: timm's weights), the teacher's configuration by file and flags, and the data."""
    flags, weights = command.model, None
    if flags.base_weight:
        weights = read(flags.base_weight, "--base-weight")
        config = teacher_config(weights, flags)
    else:
        known = named_teacher(flags)
        classes = imagenet_names() if known.published and known.classes == 1000 else ()
        config = FarConfig(
            flags.name, known.classes, known.input_size, preprocessing=known.preprocessing, classes=classes
        )
    config = replace(config, rep_by=flags.rep_by, img_size=flags.input_size or config.img_size)
    check_size(config.base_model, config.img_size)
    return weights, config, load_data(command.data, config, context, trains)


def open_teacher(
    command: ModeCommand, context: Context, trains: bool = True
) -> tuple[VisionTransformer, FarConfig, Data]:
    """The teacher, which must know the data's classes, its configuration, and the data."""
    weights, config, data = open_weights(command, context, trains)
    where = f"--base-weight {command.model.base_weight or f'(published {config.base_model})'}"
    if config.classes and data.names:
        check_classes(where, config, data, "train a teacher on this data first with --mode teacher")
    elif not (data.labelled or config.num_classes):
        raise FarError(f"{where}: holds no classifier; give a teacher's weights with one")
    elif data.labelled and config.num_classes != data.num_classes:
        config = replace(config, num_classes=data.num_classes, classes=())
    config = with_data(config, data)
    return load_teacher(weights, config), config, data


def open_student(
    command: ModeCommand, context: Context, teacher: VisionTransformer, config: FarConfig, blocks: tuple[int, ...]
) -> tuple[VisionTransformer, FarConfig]:
    """What distillation starts from: --attn-weight's model, else a copy of the teacher, which the stages swap.

    Raises FarError where --attn-weight is not what the other flags describe.
    """
    flags, weight = command.model, command.plan.attn_weight
    if not weight:
        if command.plan.skip_train_attn:
            say(context, "no --attn-weight: the block stage starts from fresh modules")
        return copy_of(teacher, flags, config), config
    source = f"--attn-weight {weight}"
    model, stored = load_model(weight, "--attn-weight", flags.drop, flags.drop_path)
    if stored.num_classes == config.num_classes:
        order_classes(model, stored.classes, config.classes, source)
    held = tuple(replacements(model))
    if command.ranks and held != blocks:
        numbers = ", ".join(map(str, held))
        raise FarError(f"{source}: has blocks {numbers} replaced, --replace auto ranks all; name them")
    for flag, wanted, found in (
        ("--base-model", config.base_model, stored.base_model),
        ("--dataset", f"{config.num_classes} classes", f"{stored.num_classes} classes"),
        ("--rep-by", config.rep_by, stored.rep_by),
        ("--replace", list(blocks), list(held)),
    ):
        if wanted != found:
            raise FarError(f"{source}: has {flag} {found}, the flags say {wanted}; make them agree")
    stored = replace(stored, preprocessing=config.preprocessing, classes=config.classes or stored.classes)
    if stored.img_size != config.img_size:
        say(context, f"{source}: its positions go from {stored.img_size} to {config.img_size} px")
        stored = resize(model, stored, config.img_size, source)
    return model, stored


def copy_of(teacher: VisionTransformer, flags: ModelConfig, config: FarConfig) -> VisionTransformer:
    """The teacher's weights in a model with the student's dropout and stochastic depth."""
    model = create_teacher(config.base_model, config.num_classes, config.img_size, flags.drop, flags.drop_path)
    model.load_state_dict(teacher.state_dict())
    return model


def those_that_train(stages: list[Stage], data: Data, settings: Settings) -> list[Stage]:
    """The stages with epochs. Raises FarError where none has any, or one could not train."""
    stages = [stage for stage in stages if stage.optim.epochs]
    if not stages:
        raise FarError("--epochs: every stage has 0 epochs, nothing would train; set one above 0")
    check_stages(stages, data, settings)
    return stages


def train_and_report(
    run: RunFolder,
    command: ModeCommand,
    model: VisionTransformer,
    config: FarConfig,
    stages: list[Stage],
    make_task: MakeTask,
    data: Data,
    teacher: VisionTransformer | None = None,
) -> dict[str, Any]:
    """Trains the stages in the run's folder and reports on the model that they hand on.

    teacher: where stages distil from one; the report then says how close the model is to it. Returns the report.
    """
    model, result = train_stages(run, command, model, config, stages, make_task, data, teacher)
    run.write_json("result.json", {**result, "parameters": count_parameters(model)})
    say(
        run.context,
        f"top-1 {result['acc1']:.2f} top-5 {result['acc5']:.2f} loss {result['loss']:.4f} "
        f"on {result['images']} images; weights in {run.path / 'best.pth'}",
    )
    return result


def train_on_labels(
    command: ModeCommand, context: Context, model: VisionTransformer, config: FarConfig, stage: Stage, data: Data
) -> None:
    """Trains one stage without a teacher and reports; --dry-run only says what would."""
    stages = those_that_train([stage], data, command.settings)
    if command.run.dry_run:
        show_dry_run(command, model, config, stages, Distillation, data)
        return
    with open_run(command.run, context, data.fingerprint) as run:
        train_and_report(run, command, model, config, stages, Distillation, data)


def prepare_ranking(command: ModeCommand) -> ModeCommand:
    """The command with images kept aside to rank blocks on. Raises FarError where no trained replacements would be."""
    plan = command.plan
    if not plan.attn_weight and (plan.skip_train_attn or not command.optim.epochs):
        raise FarError("--replace auto: ranks trained replacements; name them with --attn-weight, or train stage attn")
    if not plan.skip_train_attn:
        terms_of_blocks(plan.train_loss)
    if not command.block_ft_optim.epochs:
        raise FarError("--block-ft-epochs 0: --replace auto ends with stage block; set it above 0")
    return replace(command, data=replace(command.data, aside=ASIDE))


def choose_blocks(
    run: RunFolder,
    command: ModeCommand,
    model: VisionTransformer,
    config: FarConfig,
    stages: list[Stage],
    data: Data,
    teacher: VisionTransformer,
) -> tuple[VisionTransformer, list[Stage]]:
    """--replace auto: the teacher with its cheapest blocks replaced, and the stages that are left for these.

    The attention stages train in the run's folder attn/, unless an earlier call did; there are none where --attn-weight
    brings all replacements.
    """

    context, block = run.context, stages[-1].optim
    attn_stages = [stage for stage in stages if stage.parts == "mixing"]
    if attn_stages:
        folder = run.child("attn")
        if folder.resumed and folder.has("result.json"):
            model = load_best(folder, command)
        else:
            make_task = partial(Distillation, teacher=teacher, distill_input="teacher")  # each block right on its own
            model, result = train_stages(folder, command, model, config, attn_stages, make_task, data, teacher)
            folder.write_json("result.json", result)
    model.to(context.device)
    if run.resumed and run.has(RANKING_FILE):
        ranking = context.on_main(lambda: read_ranking(run.path / RANKING_FILE, len(model.blocks)))
    else:
        choose_kernels(model, command.settings.lstm_backend, block.batch_size, context, needs_grad=False)
        images = [images.to(context.device) for images, _ in data.aside_loader(block.batch_size)]
        hybrids = Hybrids(teacher, model, images, context, command.settings.autocast(context.device))
        ranking = rank_blocks(command.rank or "greedy", hybrids)
        run.write_json(RANKING_FILE, {"ranking": asdict(ranking)})
    chosen = context.on_main(lambda: ranking.choose(command.keep, command.min_agreement))
    if context.main:
        save_figure(cost_of_blocks(ranking, len(chosen)), run.path / "ranking.png")
    cost = ranking.path[len(chosen) - 1]
    kept = f"{cost.agreement:.2f} % of the teacher's answers stay, KL {cost.kl:.4f}"
    say(context, f"--replace auto keeps blocks {', '.join(map(str, chosen))}, cheapest by {ranking.rank}: {kept}")
    hybrid = copy_of(teacher, command.model, config)
    for i in chosen:
        hybrid.blocks[i] = model.blocks[i]
    return hybrid, distillation(chosen, command.plan, None, block)


def train_teacher(command: ModeCommand, context: Context) -> None:
    """--mode teacher: trains the attention model itself, from --base-weight where given."""
    torch.manual_seed(command.settings.seed)
    weights, config, data = open_weights(command, context)
    check_labelled(data)
    keeps = bool(weights) and keeps_classifier(weights.source, config, data)
    if not keeps:
        config = replace(config, num_classes=data.num_classes, classes=())
    config, flags = with_data(config, data), command.model
    model = create_teacher(config.base_model, config.num_classes, config.img_size, flags.drop, flags.drop_path)
    if weights:
        load_teacher_weights(model, weights, keep_head=keeps)
    optim = command.scaled(command.optim, context.world)
    stage = Stage("teacher", (), (), "full", "classification", "output", optim)
    train_on_labels(command, context, model, config, stage, data)


def downstream(command: ModeCommand, context: Context) -> None:
    """--mode downstream: a FAR model on another label set, with a fresh classifier where the classes differ."""
    torch.manual_seed(command.settings.seed)
    model, config = load_replaced(command, context)
    data = load_data(command.data, config, context)
    check_labelled(data)
    if not keeps_classifier(f"--far-weight {command.far_weight}", config, data):
        reset_classifier(model, data.num_classes, torch.Generator().manual_seed(command.settings.seed))
        config = replace(config, num_classes=data.num_classes, classes=())
        if command.ds_mode == "FC":
            say(context, "--ds-mode FC: the classifier is fresh and does not train; FC+head would train it")
    optim = command.scaled(command.optim, context.world)
    blocks = tuple(range(len(model.blocks)))
    stage = Stage("downstream", (), blocks, command.ds_mode, "classification", "output", optim)
    train_on_labels(command, context, model, with_data(config, data), stage, data)


def load_replaced(command: ModeCommand, context: Context) -> tuple[VisionTransformer, FarConfig]:
    """The FAR model that downstream and eval start from. Raises FarError unless it is one, pruned for --ds-pruned."""
    path = command.far_weight
    model, config = load_far(command, context, "--far-weight", path)
    if not config.replaced:
        raise FarError(
            f"--far-weight {path}: holds a teacher, no block of it is replaced; evaluate it as --base-weight, or "
            "move it with --mode teacher --base-weight"
        )
    if command.ds_pruned and not config.pruned:
        raise FarError(f"--ds-pruned: {path} holds an unpruned model; leave the flag out or name a pruned checkpoint")
    return model, config


def eval_mode(command: ModeCommand, context: Context) -> None:
    """--mode eval: a FAR checkpoint, compared with the teacher where --base-weight names one; or a teacher alone."""
    torch.manual_seed(command.settings.seed)
    weight, reference, settings = command.model.base_weight, None, command.settings
    if weight and not (command.far_weight or command.ds_pruned):
        model, _, data = open_teacher(command, context, trains=False)
        path = weight
        check_labelled(data)
    else:
        path = command.far_weight
        model, config = load_replaced(command, context)
        data = load_data(command.data, config, context, trains=False)
        check_classes(f"--far-weight {path}", config, data, "move it there with --mode downstream")
        if weight:
            reference = load_teacher(read(weight, "--base-weight"), config).to(context.device)
        label_by_teacher(data, reference, settings, context)
    parameters, batch_size = count_parameters(model), command.optim.batch_size
    model.to(context.device)
    choose_kernels(model, settings.lstm_backend, batch_size, context, needs_grad=False)
    if command.fuse:
        model = fuse(model, PRECISIONS[command.fuse])
    loader, autocast = data.val_loader(batch_size), settings.autocast(context.device)
    with open_run(command.run, context) if command.run.output_dir else nullcontext() as run:
        if reference is None:
            result = evaluate(model, loader, context, autocast)
        else:
            blocks = () if command.fuse else None
            result = fidelity(model, reference, loader, context, autocast, blocks)
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
    model, config = load_far(command, context, "--far-weight", command.far_weight)
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
