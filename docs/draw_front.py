"""Draws docs/front.png: what a teacher with its cheapest blocks replaced keeps, against its time on this CPU.

python3 -m docs.draw_front TEACHER.pth DATASET NAME=RUN ...     runs of main.py --replace auto by that teacher

Blocks are as stage attn left them, in the order of the run's ranking; pruned ones are refitted, not fine-tuned. All
is measured on the evaluation split, and kept in front.json, from which a call without arguments draws.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deploy.fuse import fuse
from deploy.latency import in_engine
from deploy.rivals import OPENVINO
from deploy.speed import ENGINE, in_openvino
from engine.activations import activation_score, first_batches, refit, unit_grams
from engine.fidelity import fidelity
from engine.ranking import RANKING_FILE, read_ranking
from engine.shrink import keep_share, shrink
from engine.steps import load_data
from models.replace import load_model, mlps, replacements
from plots.figures import kept_by_time, save_figure
from utils.configs import DataConfig, Settings
from utils.distributed import Context

COUNTS = (2, 4, 6, 8, 10, 12)
FORMS = {  # shares that are kept of the replacements' units and of the MLPs'
    "": (),
    ", a quarter of the units": (0.25,),
    ", and half of each MLP": (0.25, 0.5),
}
JSON = Path(__file__).with_name("front.json")


def prune(model: nn.Module, shares: tuple[float, ...], images: list[Tensor], context: Context, autocast: Callable):
    """As prune.py --keep-ratio and --prune-mlp do before they fine-tune, by training images. Returns the model."""
    parts = (replacements(model), mlps(model))[: len(shares)]
    grams = [unit_grams(model, each, images, context, autocast) for each in parts]
    kept = [keep_share(activation_score(*pair), share) for *pair, share in zip(parts, grams, shares, strict=True)]
    for each, chosen in zip(parts, kept, strict=True):
        refit(each, chosen, unit_grams(model, each, images, context, autocast))
        shrink(each, chosen)
    return model


def measure(weight: str, dataset: str, runs: dict[str, Path]) -> dict:
    """What `kept_by_time` draws, of every form of every count of blocks of every run."""
    teacher, config = load_model(weight)
    context, autocast = Context(), Settings(amp="off").autocast(torch.device("cpu"))
    plain = DataConfig(dataset, aa="none", color_jitter=0.0, reprob=0.0, vflip=0.5, num_workers=0)  # as real.py
    data = load_data(plain, config, context)
    trained, evaluated = list(first_batches(data, 32, context)), DataLoader(list(data.val_loader(32)), batch_size=None)
    models, kept, engine = {"teacher": teacher}, {}, fuse(teacher)
    for name, run in runs.items():
        student, _ = load_model(run / "attn/best.pth")
        order = read_ranking(run / RANKING_FILE, len(teacher.blocks)).order
        for count in COUNTS:
            whole = copy.deepcopy(teacher)
            for i in order[:count]:
                whole.blocks[i].attn = copy.deepcopy(student.blocks[i].attn)
            for form, shares in FORMS.items():
                model, key = prune(copy.deepcopy(whole), shares, trained, context, autocast), (name + form, count)
                report = fidelity(fuse(model), engine, evaluated, context, autocast, ())
                models[key], kept[key] = model, (report["agreement"], report["kl"])
                print(f"{key}: agreement {report['agreement']:.2f}, KL {report['kl']:.4f}", flush=True)
    times = in_engine(models, seconds=4.0 * len(models))
    series: dict[str, list] = {}
    for (title, count), costs in kept.items():
        series.setdefault(title, []).append((times[title, count], *costs, str(count)))
    rivals = {ENGINE: times["teacher"], OPENVINO: in_openvino(teacher, 4.0)}
    return {"series": series, "rivals": {f"teacher, {name}": ms for name, ms in rivals.items() if ms}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        named = dict(argument.split("=", 1) for argument in sys.argv[3:])
        measured = measure(sys.argv[1], sys.argv[2], {name: Path(run) for name, run in named.items()})
        JSON.write_text(json.dumps(measured, indent=1))
    drawn = json.loads(JSON.read_text())
    save_figure(kept_by_time(drawn["series"], drawn["rivals"]), JSON.with_suffix(".png"))
