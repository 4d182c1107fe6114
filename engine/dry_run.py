"""What a training would do, said before it begins: --dry-run."""

import math
import time
from itertools import islice

import torch
from torch import nn

from datasets.loading import Data
from engine.stages import MakeTask, Stage, select_trainable
from models.replace import FarConfig, count_parameters, describe, set_backend, swap_attention
from utils.configs import Command, Settings

IMAGES = 2  # on which the activations are weighed
STATES = 2  # of optimisers like Adam, each as large as the weights
WRITTEN = "args.json, log.jsonl, steps.jsonl, curves.png, result.json, last.pth, best.pth"


def weigh(task: nn.Module, data: Data, settings: Settings) -> tuple[int, int]:
    """Bytes that a training step of the task needs: those independent of the batch, and those of each image.

    The latter are those of the tensors that the forward pass keeps for the backward one, weights not counted.
    """
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    count = min(IMAGES, len(data.train))
    device = next(task.parameters()).device
    images = torch.stack(list(islice(data.pictures(), count))).to(device)
    targets = torch.zeros(count, dtype=torch.long, device=device)
    if mixer := settings.mixer(data.num_classes):
        images, targets = mixer(images, targets)
    task.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), settings.autocast(device)():
        loss, _ = task(images, targets)
    del loss
    trained = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    fixed = sum(p.numel() * p.element_size() for p in task.parameters())
    return fixed + (1 + STATES) * trained, sum(kept.values()) // count


def show_dry_run(
    command: Command,
    model: nn.Module,
    config: FarConfig,
    stages: list[Stage],
    make_task: MakeTask,
    data: Data,
    more: str = "",
    teacher: nn.Module | None = None,
) -> None:
    """Prints data, model, stages, memory and files; the model is swapped as the stages would.

    more: files besides. teacher: a copy, in which --replace auto replaces the blocks that it chooses.
    """
    context, settings, run = data.context, command.settings, command.run
    if not context.main:
        return
    where = "" if data.config.dataset == "DIGITS" else f" in {data.config.root}"
    aside = f", {len(data.aside):,} to rank blocks on" if data.aside else ""
    names, classes = data.class_names, f"{data.num_classes} classes" if data.labelled else "no labels"
    shown = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    counts = f"{len(data.train):,} training{aside}, {len(data.val):,} evaluation images, {classes}{shown}"
    started, images, count, seconds = time.perf_counter(), data.pictures(), 0, 0.0
    while seconds < 1:
        next(images)
        count, seconds = count + 1, time.perf_counter() - started
    lines = [
        ("data", f"{data.config.dataset}{where}: {counts}"),
        ("", f"{count / seconds:,.0f} images a second and loader process, {data.workers} of them"),
        ("model", f"{config.base_model}, {config.img_size} px: {count_parameters(model):,} parameters"),
    ]
    for stage in stages:
        if teacher is not None and stage.parts != "mixing":
            model, teacher = teacher, None
        swap_attention(model, stage.swapped, config.rep_by, settings.rep_init)
        set_backend(model, settings.lstm_backend)
        model.to(context.device)
        trained, optim = select_trainable(model, stage), stage.optim
        updates = math.ceil(len(data.train_loader(optim.batch_size)) / optim.accum_steps)
        batch = f"{optim.batch_size} images a process" + f" x {context.world}" * (context.world > 1)
        fixed, image = weigh(make_task(model, stage, settings.criterion()).to(context.device), data, settings)
        total = fixed + image * min(optim.batch_size, len(data.train))
        memory = f"about {total / 1e9:.2f} GB a process: {fixed / 1e6:.0f} MB and {image / 1e6:.1f} MB an image"
        lines += [
            (f"stage {stage.name}", f"{trained:,} of {count_parameters(model):,} parameters on {stage.loss}"),
            ("", f"{optim.epochs} epochs of {updates:,} updates, {batch}, {optim.opt}, rate {optim.lr:.3g}"),
            ("", memory),
        ]
    left = describe(model, config)
    lines.append(("leaves", f"{len(left.replaced)} of {len(model.blocks)} blocks replaced by {config.rep_by}"))
    lines.append(("files", f"{run.output_dir or f'runs/{run.mode}-<time>'}: {WRITTEN}{more}"))
    width = max(14, *(len(title) + 2 for title, _ in lines))
    print("\n".join(f"{title:<{width}}{text}" for title, text in lines), flush=True)
