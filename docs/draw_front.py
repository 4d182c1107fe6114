"""Draws docs/front.png: what a teacher with its cheapest blocks replaced keeps, against its time on this CPU.

python3 docs/draw_front.py TEACHER.pth DATASET NAME=RUN ...     runs of main.py --replace auto by that teacher

Blocks are as stage attn left them, in the order of the run's ranking; pruned ones are refitted, not fine-tuned. All
is measured on the evaluation split, and kept in front.json, from which a call without arguments draws.
"""

import copy
import json
import sys
from pathlib import Path

import torch

from datasets.loading import Data
from deploy.rivals import OPENVINO
from deploy.speed import ENGINE, in_openvino, one_image
from engine.activations import activation_score, first_batches, refit, unit_grams
from engine.fidelity import fidelity
from engine.ranking import FILE, read_ranking
from engine.shrink import keep_share, shrink
from models.replace import load_model, mlps, replacements
from plots.figures import kept_by_time, save_figure
from utils.configs import DataConfig, Settings
from utils.distributed import Context

COUNTS = (2, 4, 6, 8, 10, 12)
PRUNED = "a quarter of the units, half of the MLPs"
JSON = Path(__file__).with_name("front.json")


def prune(model, data: Data, context: Context, autocast) -> None:
    """As prune.py --keep-ratio 0.25 --prune-mlp 0.5 does before it fine-tunes."""
    for parts, share in ((replacements(model), 0.25), (mlps(model), 0.5)):
        grams = unit_grams(model, parts, first_batches(data, 32, context), context, autocast)
        kept = keep_share(activation_score(parts, grams), share)
        refit(parts, kept, unit_grams(model, parts, first_batches(data, 32, context), context, autocast))
        shrink(parts, kept)


def measure(weight: str, dataset: str, runs: dict[str, Path]) -> dict:
    teacher, config = load_model(weight)
    context, autocast = Context(), Settings(amp="off").autocast(torch.device("cpu"))
    data = Data(DataConfig(dataset, None, config.img_size, num_workers=0), context)
    models, kept = {"teacher": teacher}, {}
    for name, run in runs.items():
        student, order = load_model(run / "attn/best.pth")[0], read_ranking(run / FILE, len(teacher.blocks)).order
        for count in COUNTS:
            whole = copy.deepcopy(teacher)
            for i in order[:count]:
                whole.blocks[i].attn = copy.deepcopy(student.blocks[i].attn)
            prune(pruned := copy.deepcopy(whole), data, context, autocast)
            for title, model in ((name, whole), (f"{name}, {PRUNED}", pruned)):
                report, key = fidelity(model, teacher, data.val_loader(32), context, autocast, ()), f"{title}: {count}"
                models[key], kept[key] = model, (report["agreement"], report["kl"])
                print(f"{key} blocks, agreement {report['agreement']:.2f}, KL {report['kl']:.4f}", flush=True)
    times = one_image(models, seconds=4.0 * len(models))
    series: dict[str, list] = {}
    for key, (agreement, kl) in kept.items():
        title, _, count = key.rpartition(": ")
        series.setdefault(title, []).append((times[ENGINE][key], agreement, kl, count))
    rivals = {ENGINE: times[ENGINE]["teacher"], OPENVINO: in_openvino(teacher, 4.0)}
    return {"series": series, "rivals": {f"teacher, {name}": ms for name, ms in rivals.items() if ms}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        named = dict(argument.split("=", 1) for argument in sys.argv[3:])
        measured = measure(sys.argv[1], sys.argv[2], {name: Path(run) for name, run in named.items()})
        JSON.write_text(json.dumps(measured, indent=1))
    drawn = json.loads(JSON.read_text())
    save_figure(kept_by_time(drawn["series"], drawn["rivals"]), JSON.with_suffix(".png"))
