"""The whole of FAR on the handwritten digits: a teacher, its attention swapped, distilled, moved downstream, pruned.

python3 demo.py                      one seed, pictures and a table in runs/demo
python3 demo.py --seeds 0 1 2        the accuracies of several seeds
python3 demo.py --ablation           the choices behind the defaults, tuned on held-out training images
"""

import os
import sys
from pathlib import Path
from statistics import mean

# A demo has the machine to itself: its idle threads may wait longer than utils lets them, which is a twentieth faster.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from datasets.loading import Data
from datasets.registry import Digits
from deploy.speed import ENGINE, ONNX_RUNTIME, one_image
from engine.fidelity import fidelity
from models.replace import load_model, swap_attention
from plots.figures import fidelity_by_block, save_figure
from plots.page import Section, write_page
from plots.pictures import visualize
from utils.checkpoint import write_json
from utils.configs import DataConfig, PictureConfig, Settings
from utils.distributed import Context
from utils.files import check_writable
from utils.recipe import Recipe, recipe_parser
from utils.script import run_script
from utils.terminal import table

COMMON = """--scale Micro --num-workers 0 --unscale-lr --aa none --reprob 0 --color-jitter 0 --smoothing 0 --drop-path 0
--select last --eval-every 4 --save-every 4""".split()
OPTIM, BLOCK_OPTIM = "--batch-size 64 --clip-grad 1".split(), "--block-ft-batch-size 64 --block-ft-clip-grad 1".split()
DIGITS = ["--dataset", "DIGITS"]
TEACHER = ["--mode", "teacher", *OPTIM, *"--epochs 50 --lr 2e-3 --warmup-epochs 8".split()]
STAGE = ["--mode", "train", *OPTIM, *BLOCK_OPTIM, *"--lr 1e-2 --warmup-epochs 3 --block-ft-epochs 0".split()]
ATTN = [*STAGE, "--epochs", "20", "--train-loss", "preserve"]
BLOCK = ["--mode", "block-distill", *BLOCK_OPTIM, *"--block-ft-epochs 8 --block-ft-lr 1e-3".split()]
BLOCK += ["--block-ft-warmup-epochs", "1", "--block-ft-train-loss", "preserve"]
# In the ablation and in study.py, 32 epochs together; their losses are the rows'.
COMPARED, COMPARED_BLOCK = [*STAGE, "--epochs", "24"], [*BLOCK, "--block-ft-train-loss", "combine"]
PRUNE = [
    *OPTIM,
    *"""--epochs 6 --lr 1e-3 --warmup-epochs 1 --decay 1e-3 --keep-ratio 0.5 --ft-epochs 12 --ft-lr 3e-3
--ft-warmup-epochs 1 --ft-batch-size 64 --ft-clip-grad 1""".split(),
]
DOWNSTREAM = ["--mode", "downstream", *OPTIM, *"--dataset FOLDER --epochs 5 --lr 1e-3 --warmup-epochs 1".split()]


def write_parity(root: Path) -> None:
    """The same images under another label set, as class folders: is the digit even or odd? Train and val stay apart."""
    for split in ("train", "val"):
        digits = Digits(train=split == "train")
        for i, (image, label) in enumerate(zip(digits.images, digits.targets, strict=True)):
            path = root / split / ("odd" if label % 2 else "even") / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def untrained(weights: str, seed: int) -> dict:
    """How the teacher with fresh modules in attention's place compares with the teacher, on the evaluation split."""
    (teacher, config), (student, _) = load_model(weights), load_model(weights)
    torch.manual_seed(seed)
    swap_attention(student, range(len(student.blocks)), "multi-lstm")
    loader = Data(DataConfig("DIGITS", Path(), config.img_size, num_workers=0), Context()).val_loader(64)
    return fidelity(student, teacher, loader, Context(), Settings().autocast(Context().device))


def run_demo(root: Path, seed: int, subset: float, epochs: int | None) -> dict:
    """Every step for one seed; returns what summary.json holds."""
    recipe = Recipe(root, [*COMMON, "--seed", str(seed)], epochs)
    data = [*DIGITS, "--train-subset", f"{subset:g}"]
    teacher = recipe.run("main.py", "teacher", *TEACHER, *data)
    base = ["--base-weight", recipe.best("teacher"), *data]
    attn = recipe.run("main.py", "attn", *ATTN, *base)
    far = recipe.run("main.py", "far", *BLOCK, *base, "--attn-weight", recipe.best("attn"))
    parity = root / "data/parity"
    write_parity(parity)
    moved = ["--data-path", str(parity), "--far-weight", recipe.best("far")]
    downstream = recipe.run("main.py", "downstream", *DOWNSTREAM, *moved)
    pruned = recipe.run("prune.py", "prune", *PRUNE, *base, "--model-path", recipe.best("far"))["rows"][-1]

    before = untrained(recipe.best("teacher"), seed)
    stages = {"before training": before, "after stage attn": attn, "after stage block": far, "pruned": pruned}
    save_figure(fidelity_by_block(stages), root / "fidelity.png")
    ms = one_image({name: load_model(recipe.best(name))[0] for name in ("teacher", "far", "prune")})
    rows = {}
    for label, name, report in (
        ("teacher (attention)", "teacher", teacher),
        ("FAR after stage attn", "attn", attn),
        ("FAR after stage block", "far", far),
        ("FAR pruned to half its units", "prune", pruned),
        ("FAR downstream (even/odd)", "downstream", downstream),
    ):
        rows[label] = {key: report.get(key) for key in ("acc1", "agreement", "parameters")}
        rows[label] |= {runtime: times[name] for runtime, times in ms.items() if name in times}
        rows[label]["seconds"] = recipe.seconds[name]
    keys = ("agreement", "kl", "z_similarity", "output_error")
    kept = {when: {key: report[key] for key in keys} for when, report in stages.items()}
    return {"seed": seed, "rows": rows, "fidelity": kept, "kept_units": pruned["units"]}


COLUMNS = {
    "top-1 %": ("acc1", ".2f"),
    "agrees %": ("agreement", ".2f"),
    "parameters": ("parameters", ","),
    f"ms, {ENGINE}": (ENGINE, ".2f"),
    f"ms, {ONNX_RUNTIME}": (ONNX_RUNTIME, ".2f"),
    "trained for s": ("seconds", ".1f"),
}


def table_rows(summary: dict) -> list[list[str]]:
    """The final table, its heads first; what was not measured stays empty."""
    rows = [
        [label, *("" if row.get(key) is None else f"{row[key]:{form}}" for key, form in COLUMNS.values())]
        for label, row in summary["rows"].items()
    ]
    return [["model", *COLUMNS], *rows]


def write_gallery(root: Path, summary: dict) -> Path:
    """One page of all that the demo measured and drew, and what its models look at; returns its path."""
    flags = {"base_weight": "teacher", "far_weight": "far", "pruned_weight": "prune"}
    weights = {flag: root / name / "best.pth" for flag, name in flags.items()}
    _, looks = visualize(PictureConfig(**weights, output_dir=root / "figures", count=2))
    cosines = {when: report["z_similarity"] for when, report in summary["fidelity"].items()}
    heads = ["cosine of z", *(f"block {block}" for block in cosines["pruned"])]
    preserved = [heads, *([when, *(f"{v:.2f}" for v in blocks.values())] for when, blocks in cosines.items())]
    curves = {
        "teacher/curves.png": "The teacher's training",
        "attn/curves.png": "Stage attn: LSTMs in attention's place learn from it",
        "far/curves.png": "Stage block: the blocks train whole",
        "downstream/curves.png": "Downstream: even or odd",
        "prune/regularize/curves.png": "Before pruning: regularized training",
        "prune/curves.png": "After pruning: fine-tuning",
        "prune/units.png": "Units that pruning kept, by block, head and direction",
    }
    sections = [
        Section(
            "What came out",
            "Agrees: the share of evaluation images on which a model names its teacher's class. ms: milliseconds for "
            "one image on this CPU.",
            table_rows(summary),
        ),
        Section(
            "What is preserved",
            "Each block's z (the joined outputs of its heads) beside the teacher's: cosine similarity, 1 is the same.",
            preserved,
            [(root / "fidelity.png", "z and the blocks' outputs beside the teacher's")],
        ),
        Section("How it was trained and pruned", "", (), [(root / name, shown) for name, shown in curves.items()]),
        *looks,
    ]
    write_page(root / "index.html", "FAR: the demo", sections)
    return root / "index.html"


# By name: flags of stage attn (None leaves it out) and of stage block (None leaves it out), besides the compared ones.
ABLATION: dict[str, tuple[list[str] | None, list[str] | None]] = {
    "default (student input, chrono, attn then block)": ([], []),
    "--distill-input teacher": (["--distill-input", "teacher"], ["--distill-input", "teacher"]),
    "--rep-by gru": (["--rep-by", "gru"], ["--rep-by", "gru"]),
    "--rep-by mixer": (["--rep-by", "mixer"], ["--rep-by", "mixer"]),
    "--rep-init value": (["--rep-init", "value"], []),
    "--rep-init random": (["--rep-init", "random"], []),
    "stage block alone, same epochs": (
        None,
        ["--block-ft-epochs", "32", "--block-ft-lr", "3e-3", "--block-ft-warmup-epochs", "3"],
    ),
    "stage attn alone, same epochs": (["--epochs", "32"], None),
}


def ablation(root: Path, seeds: list[int]) -> None:
    """Same budget of 32 epochs for each row, evaluated on a fifth of the training images, kept out of training."""
    rows: dict[str, list[float]] = {name: [] for name in ["teacher", *ABLATION]}
    for seed in seeds:
        recipe = Recipe(root / str(seed), [*COMMON, "--seed", str(seed)])
        data = [*DIGITS, "--holdout", "0.2"]
        rows["teacher"].append(recipe.run("main.py", "teacher", *TEACHER, *data)["acc1"])
        base = ["--base-weight", recipe.best("teacher"), *data]
        for k, (name, (attn, block)) in enumerate(ABLATION.items()):
            start = []
            if attn is not None:
                result = recipe.run("main.py", f"attn{k}", *COMPARED, *base, *attn)
                start = ["--attn-weight", recipe.best(f"attn{k}")]
            if block is not None:
                result = recipe.run("main.py", f"far{k}", *COMPARED_BLOCK, *base, *start, *block)
            rows[name].append(result["acc1"])
            write_json(root / "ablation.json", rows)
    heads = ["top-1 % on held-out training images", *(f"seed {seed}" for seed in seeds), "mean"]
    print("\n" + table([heads, *([name, *(f"{v:.2f}" for v in (*vs, mean(vs)))] for name, vs in rows.items())]))


def demo(argv: list[str] | None = None) -> int:
    parser = recipe_parser(__doc__.splitlines()[0], "runs/demo")
    parser.add_argument("--ablation", action="store_true", help="measure the choices behind the defaults instead")
    args = parser.parse_args(argv)
    root = args.output_dir
    check_writable(root)
    if args.ablation:
        ablation(root, args.seeds)
        return 0
    alone = len(args.seeds) == 1
    summaries = []
    for seed in args.seeds:
        summaries.append(run_demo(root if alone else root / f"seed{seed}", seed, args.train_subset, args.epochs))
        if not alone:
            print(f"\nseed {seed}\n{table(table_rows(summaries[-1]))}", flush=True)
    page = write_gallery(root, summaries[0]) if alone else None
    write_json(root / "summary.json", summaries[0] if alone else summaries)  # the last: the demo is finished
    print(f"\nwritten to {root}: summary.json, and a folder of curves and weights for each stage")
    if page:
        print(f"\n{table(table_rows(summaries[0]))}\n\nopen {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(demo))
