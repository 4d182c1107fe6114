"""The whole of FAR on the handwritten digits: a teacher, its attention swapped, distilled, moved downstream, pruned.

python3 demo.py                      one seed, pictures and a table in runs/demo
python3 demo.py --seeds 0 1 2        the accuracies of several seeds
python3 demo.py --ablation           the choices behind the defaults, tuned on held-out training images
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

# A demo has the machine to itself: its idle threads may wait longer than utils lets them, which is a twentieth faster.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import main
import prune
from datasets.loading import Data, DataConfig
from datasets.registry import Digits
from deploy.speed import ENGINE, ONNX_RUNTIME, one_image
from engine.fidelity import fidelity
from engine.train import Settings
from models.replace import load_model, swap_attention
from plots.figures import fidelity_by_block, save_figure
from plots.page import Section, write_page
from plots.pictures import PictureConfig, visualize
from utils.arguments import PART, SEED, SIZE, Parser, path
from utils.checkpoint import write_atomic
from utils.distributed import Context
from utils.errors import FarError
from utils.files import check_writable
from utils.script import run_script

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
MARK = ".far-demo"  # in a folder that the demo made or found empty: what is below is its own
OWN = (
    "teacher",
    "attn",
    "far",
    "downstream",
    "prune",
    "figures",
    "data/parity",
    "fidelity.png",
    "index.html",
    "summary.json",
    "*.seconds",
    "seed*",
)


def write_parity(root: Path) -> None:
    """The same images under another label set, as class folders: is the digit even or odd? Train and val stay apart."""
    for split in ("train", "val"):
        digits = Digits(train=split == "train")
        for i, (image, label) in enumerate(zip(digits.images, digits.targets, strict=True)):
            path = root / split / ("odd" if label % 2 else "even") / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def claim(root: Path) -> None:
    """Makes the demo's folder; a finished demo in it is removed, to start afresh, and nothing else ever is."""
    check_writable(root)
    if not (root / MARK).exists() and root.exists() and any(root.iterdir()):
        raise FarError(f"--output-dir {root}: holds files that no demo made; name a new or an empty folder")
    if (root / "summary.json").exists():
        for made in (path for pattern in OWN for path in root.glob(pattern)):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).touch()


SHOWN = {"base_weight": "teacher", "far_weight": "far", "pruned_weight": "prune"}  # what is drawn and timed
CURVES = {
    "teacher": "The teacher's training",
    "attn": "Stage attn: LSTMs in attention's place learn from it",
    "far": "Stage block: the blocks train whole",
    "downstream": "Downstream: even or odd",
    "prune/regularize": "Before pruning: regularized training",
    "prune": "After pruning: fine-tuning",
}
READING = (
    "Agrees: the share of evaluation images on which a model names its teacher's class. ms: milliseconds for one image "
    "on this CPU."
)
INSIDE = ("agreement", "kl", "z_similarity", "output_error")


SCRIPTS = {"main.py": main.main, "prune.py": prune.main}


def in_this_process(script: str, argv: list[str]) -> None:
    SCRIPTS[script](argv)


class Demo:
    """Runs the scripts one after the other in a folder; an interrupted demo goes on where it stopped.

    common: flags of every command. call: what runs one, given its script and flags.
    """

    def __init__(
        self,
        root: Path,
        seed: int,
        data: list[str],
        epochs: str = "",
        common: Sequence[str] = COMMON,
        call: Callable[[str, list[str]], None] = in_this_process,
    ):
        self.root, self.seed, self.data, self.epochs, self.common, self.call = root, seed, data, epochs, common, call
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, *argv: str) -> dict:
        """One call of main.py into root/name; returns its result.json."""
        return self._run(name, "main.py", self._shrunk(argv), "result.json")

    def prune(self, *argv: str, name: str = "prune") -> dict:
        """One call of prune.py into root/name; returns its report."""
        return self._run(name, "prune.py", self._shrunk(argv), "prune_report.json")

    def _run(self, name: str, script: str, argv: list[str], result: str) -> dict:
        run, started = self.root / name, time.perf_counter()
        timing = self.root / f"{name}.seconds"
        finished = (run / result).exists()
        argv = [*self.common, *argv, "--seed", str(self.seed), "--output-dir", str(run), "--resume", "auto"]
        print(f"\n== {name}: python3 {script} {' '.join(argv)}", flush=True)
        self.call(script, argv)  # a finished one too: one of other flags is refused
        if not finished:
            timing.write_text(f"{time.perf_counter() - started:.1f}")
        self.seconds[name] = float(timing.read_text()) if timing.exists() else 0.0  # killed right after its result
        return json.loads((run / result).read_text())

    def _shrunk(self, argv: tuple[str, ...]) -> list[str]:
        """Epochs cut down where `--epochs` asks for it; a stage left out with 0 epochs stays out."""
        cut = list(argv)
        for flag in ("--epochs", "--block-ft-epochs", "--ft-epochs"):
            if self.epochs and flag in cut and cut[cut.index(flag) + 1] != "0":
                cut[cut.index(flag) + 1] = self.epochs
        return cut

    def best(self, name: str) -> str:
        return str(self.root / name / "best.pth")

    def run(self) -> dict:
        teacher = self.stage("teacher", *TEACHER, *self.data)
        weight = ["--base-weight", self.best("teacher"), *self.data]
        attn = self.stage("attn", *ATTN, *weight)
        far = self.stage("far", *BLOCK, *weight, "--attn-weight", self.best("attn"))
        write_parity(self.root / "data" / "parity")
        moved = ["--data-path", str(self.root / "data" / "parity"), "--far-weight", self.best("far")]
        downstream = self.stage("downstream", *DOWNSTREAM, *moved)
        pruned = self.prune(*PRUNE, *weight, "--model-path", self.best("far"))
        last = pruned["rows"][-1]
        inside = {"before training": self.before(), "after stage attn": attn, "after stage block": far, "pruned": last}
        save_figure(fidelity_by_block(inside), self.root / "fidelity.png")
        models = {name: load_model(self.best(name))[0] for name in SHOWN.values()}
        return {
            "seed": self.seed,
            "teacher_acc1": teacher["acc1"],
            "attn_acc1": attn["acc1"],
            "far_acc1": far["acc1"],
            "downstream_acc1": downstream["acc1"],
            "teacher_params": teacher["parameters"],
            "far_params": far["parameters"],
            "pruned_acc1": last["acc1"],
            "pruned_params": last["parameters"],
            "kept_units": last["units"],
            "attn_agreement": attn["agreement"],
            "far_agreement": far["agreement"],
            "pruned_agreement": last["agreement"],
            "fidelity": {when: {key: report[key] for key in INSIDE} for when, report in inside.items()},
            "milliseconds": one_image(models),
            "seconds": self.seconds,
            "total_seconds": sum(self.seconds.values()),
        }

    def before(self) -> dict:
        """How the teacher with fresh modules compares with the teacher, on the evaluation split."""
        teacher, config = load_model(self.best("teacher"), "--base-weight")
        student, _ = load_model(self.best("teacher"), "--base-weight")
        import torch  # after main.py, which asks its threads not to spin

        torch.manual_seed(self.seed)
        swap_attention(student, range(len(student.blocks)), "multi-lstm")
        loader = Data(DataConfig("DIGITS", Path(), config.img_size, num_workers=0), Context()).val_loader(64)
        return fidelity(student, teacher, loader, Context(), Settings().autocast(Context().device))


def rows(summary: dict) -> list[list[str]]:
    """The final table, its heads first."""
    found = [["model", "top-1 %", "agrees %", "parameters", "ms, our engine", "ms, ONNX Runtime", "trained for s"]]
    for label, model, params, when, timed in (
        ("teacher (attention)", "teacher", "teacher_params", "teacher", "teacher"),
        ("FAR after stage attn", "attn", "far_params", "attn", ""),
        ("FAR after stage block", "far", "far_params", "far", "far"),
        ("FAR pruned to half its units", "pruned", "pruned_params", "prune", "prune"),
        ("FAR downstream (even/odd)", "downstream", "far_params", "downstream", ""),
    ):
        agreement = summary.get(f"{model}_agreement")
        times = [summary["milliseconds"][runtime][timed] if timed else "" for runtime in (ENGINE, ONNX_RUNTIME)]
        numbers = [
            f"{summary[f'{model}_acc1']:.2f}",
            "" if agreement is None else f"{agreement:.2f}",
            f"{summary[params]:,}",
            *("-" if ms is None else ms and f"{ms:.2f}" for ms in times),
            f"{summary['seconds'][when]:.1f}",
        ]
        found.append([label, *numbers])
    return found


def table(summary: dict) -> str:
    """The same as text."""
    return text_table(rows(summary))


def text_table(found: list[list[str]]) -> str:
    """Rows of cells, the first one its heads, in columns."""
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    return "\n".join(
        f"{label:<{widths[0]}}" + "".join(f"{cell:>{w + 2}}" for cell, w in zip(cells, widths[1:], strict=True))
        for label, *cells in found
    )


def gallery(root: Path, summary: dict) -> Path:
    """Draws what the models look at, and one page of all that the demo found and drew; returns its path."""
    weights = {flag: root / folder / "best.pth" for flag, folder in SHOWN.items()}
    _, looks = visualize(PictureConfig(**weights, output_dir=root / "figures", count=2))
    blocks = [
        [when, *(f"{v:.2f}" for v in report["z_similarity"].values())] for when, report in summary["fidelity"].items()
    ]
    curves = [(root / name / "curves.png", what) for name, what in CURVES.items()]
    units = (root / "prune/units.png", "Units that pruning kept, by block, head and direction")
    sections = [
        Section("What came out", READING, rows(summary)),
        Section(
            "What is preserved",
            "Each block's z (the joined outputs of its heads) beside the teacher's: cosine similarity, 1 is the same.",
            [["cosine of z", *(f"block {i}" for i in range(len(blocks[0]) - 1))], *blocks],
            [(root / "fidelity.png", "z and the blocks' outputs beside the teacher's")],
        ),
        Section("How it was trained and pruned", "", (), [*curves, units]),
        *looks,
    ]
    write_page(root / "index.html", "FAR: the demo", sections)
    return root / "index.html"


ABLATION = {
    "default (student input, chrono, attn then block)": ([], [], True),
    "--distill-input teacher": (["--distill-input", "teacher"], ["--distill-input", "teacher"], True),
    "--rep-by gru": (["--rep-by", "gru"], ["--rep-by", "gru"], True),
    "--rep-by mixer": (["--rep-by", "mixer"], ["--rep-by", "mixer"], True),
    "--rep-init value": (["--rep-init", "value"], [], True),
    "--rep-init random": (["--rep-init", "random"], [], True),
    "stage block alone, same epochs": (
        [],
        ["--block-ft-epochs", "32", "--block-ft-lr", "3e-3", "--block-ft-warmup-epochs", "3"],
        False,
    ),
    "stage attn alone, same epochs": (["--epochs", "32"], None, True),
}


def ablation(root: Path, seeds: list[int]) -> None:
    """Same budget of 32 epochs for each row, evaluated on a fifth of the training images, kept out of training."""
    rows: dict[str, list[float]] = {name: [] for name in ["teacher", *ABLATION]}
    for seed in seeds:
        demo = Demo(root / str(seed), seed, [*DIGITS, "--holdout", "0.2"])
        rows["teacher"].append(demo.stage("teacher", *TEACHER, *demo.data)["acc1"])
        weight = ["--base-weight", demo.best("teacher"), *demo.data]
        for k, (name, (attn, block, with_attn)) in enumerate(ABLATION.items()):
            start = []
            if with_attn:
                result = demo.stage(f"attn{k}", *COMPARED, *weight, *attn)
                start = ["--attn-weight", demo.best(f"attn{k}")]
            if block is not None:
                result = demo.stage(f"far{k}", *COMPARED_BLOCK, *weight, *start, *block)
            rows[name].append(result["acc1"])
            write_json(root / "ablation.json", rows)
    print(f"\n{'top-1 % on held-out training images':<52}{'seeds ' + ' '.join(map(str, seeds)):>24}{'mean':>8}")
    for name, values in rows.items():
        print(f"{name:<52}{' '.join(f'{v:.2f}' for v in values):>24}{mean(values):>8.2f}")


def write_json(path: Path, content) -> None:
    write_atomic(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def demo(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[0], help="several seeds run in folders of their own")
    parser.add_argument("--ablation", action="store_true", help="measure the choices behind the defaults instead")
    parser.add_argument("--epochs", type=SIZE, help="every stage's epochs, to try the demo out")
    parser.add_argument(
        "--train-subset", type=PART, default=1.0, help="share of the training images, to try the demo out"
    )
    args = parser.parse_args(argv)
    root = args.output_dir
    claim(root)
    if args.ablation:
        ablation(root, args.seeds)
        return 0
    epochs = str(args.epochs or "")
    summaries = []
    for seed in args.seeds:
        folder = root if len(args.seeds) == 1 else root / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        summaries.append(Demo(folder, seed, [*DIGITS, "--train-subset", f"{args.train_subset:g}"], epochs).run())
        if len(args.seeds) > 1:
            print(f"\nseed {seed}\n{table(summaries[-1])}", flush=True)
    page = gallery(root, summaries[0]) if len(summaries) == 1 else None
    write_json(root / "summary.json", summaries if page is None else summaries[0])  # the last: the demo is finished
    print(f"\nwritten to {root}: summary.json, and a folder of curves and weights for each stage")
    if page:
        print(f"\n{table(summaries[0])}\n\nopen {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(demo))
