"""FAR's speed against attention's: whole models in the runtimes people deploy, and layers, by batch and tokens.

python3 benchmark.py                 everything, DeiT-Tiny, random weights (speed does not depend on them)
python3 benchmark.py --device cuda   layers and models on a GPU, by every kernel beside attention (`make gpu`)
"""

import contextlib
import json
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deploy import gpu_speed, rivals, speed, timing
from models.count import count_macs
from models.deit import LARGEST_INPUT, fits_patches
from models.replace import count_parameters
from plots.figures import accuracy_by_latency, latency_by_tokens, save_figure
from utils.arguments import SECONDS, SIZE, Parser, path, pick
from utils.checkpoint import write_atomic
from utils.distributed import pick_device
from utils.errors import FarError
from utils.files import check_writable
from utils.script import run_script


def show(title: str, times: speed.Times, against: str) -> None:
    print(f"\n{title}")
    for name, t in times.items():
        low, high = t["quartiles_ms"]
        ratio = times[against]["median_ms"] / t["median_ms"]
        print(
            f"  {name:<26}{t['median_ms']:>10.3f} ms  ({low:.3f} to {high:.3f}){ratio:>8.2f}x as fast as {against}",
            flush=True,
        )


@dataclass(frozen=True)
class Config:
    """What the flags ask for; see `build_parser`."""

    output_dir: Path
    seconds: float
    batches: list[int]
    image_size: list[int]
    runtimes: list[str]
    runs: list[Path]

    def __post_init__(self):
        if odd := [size for size in self.image_size if not fits_patches(rivals.BASE, size)]:
            raise FarError(f"--image-size {odd[0]}: {rivals.BASE} needs a multiple of 16 up to {LARGEST_INPUT}")


def count_sizes() -> dict[str, dict[str, int]]:
    """Parameters and MACs of whole models."""
    models = {name: variant.build(224) for name, variant in rivals.VARIANTS.items()}
    sizes = {name: {"parameters": count_parameters(m), "macs": count_macs(m)} for name, m in models.items()}
    print(f"{'model, 224 px, random weights':<30}{'parameters':>12}{'million MACs':>14}")
    for name, size in sizes.items():
        print(f"  {name:<28}{size['parameters']:>12,}{size['macs'] / 1e6:>14,.0f}")
    return sizes


def start_rivals(runtimes: list[str], setting: rivals.Setting) -> rivals.Rivals:
    """Those that can run here; the others are named."""
    found = rivals.programs(runtimes)
    for program in found:
        if reason := program.lacks():
            print(f"  skipped: {program}: {reason}")
    return rivals.Rivals([program for program in found if not program.lacks()], setting)


def compare_programs(config: Config, threads: int) -> dict[tuple[int, int], dict[str, dict]]:
    """Whole models at (batch, size), each runtime in a process of its own, in turns."""
    found: dict[tuple[int, int], dict[str, dict]] = {}
    shapes = [(batch, 224) for batch in config.batches] + [(1, size) for size in config.image_size if size != 224]
    print(f"\nwhole models, {threads} threads, median ms; programs take turns")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(start_rivals(config.runtimes, rivals.Setting(threads, folder))) as running,
    ):
        for batch, size in tqdm(shapes, desc="shapes", unit="shape", leave=False, disable=None):
            asked = [program for program in running.programs if size == 224 or program.large]
            found[batch, size] = running.compare(asked, batch, size, config.seconds / 5)
            for program, complaint in running.failed.items():
                print(f"  failed at batch {batch}, {size} px: {program}: {complaint}", flush=True)
    print(f"  {'':<46}" + "".join(f"{f'{b} x {s} px':>13}" for b, s in shapes))
    for name in dict.fromkeys(name for times in found.values() for name in times):
        cells = [times.get(name, {}).get("median_ms") for times in found.values()]
        print(f"  {name:<46}" + "".join(f"{ms:>13.2f}" if ms else f"{'':>13}" for ms in cells), flush=True)
    return found


def by_batch(kind: str, things: dict, shape: tuple[int, ...], config: Config, against: str) -> dict[str, speed.Times]:
    """Times of all things at each batch size, `shape` being one sample's."""
    found = {}
    for batch in config.batches:
        x = torch.randn(batch, *shape)
        calls = {name: lambda m=m, x=x: m.eval()(x) for name, m in things.items()}
        title = f"{kind}, batch {batch}, threads {torch.get_num_threads()}"
        found[title] = timing.interleaved(calls, config.seconds, 3)
        show(title, found[title], against)
    return found


def by_tokens(things: dict, config: Config) -> dict[str, list[dict]]:
    """Time and extra memory of a layer over image sizes, batch 1."""
    curve: dict[str, list[dict]] = {}
    for size in config.image_size:
        tokens = (size // 16) ** 2 + 1
        x = torch.randn(1, tokens, rivals.DIM)
        calls = {name: lambda m=things[name], x=x: m(x) for name in ("attention", "FAR fused", *speed.KEEP)}
        times = timing.interleaved(calls, config.seconds / 2, 3)
        show(f"layer, batch 1, {size} px, {tokens} tokens", times, "attention")
        for name, call in calls.items():
            curve.setdefault(name, []).append({"tokens": tokens, "peak_bytes": timing.peak_bytes(call), **times[name]})
            print(f"  {name:<26}{curve[name][-1]['peak_bytes'] / 1e6:>10.1f} MB at most allocated besides")
    return curve


@torch.inference_mode()
def layer_times(config: Config, layers: dict) -> dict[str, Any]:
    """Layers by batch, and over the number of tokens."""
    out = by_batch("layer", layers, (197, rivals.DIM), config, "attention")
    return out | {"tokens": by_tokens(layers, config)}


def trained_models(config: Config) -> list[dict]:
    """Accuracy beside time, of the demo's models; none where there is no demo."""
    rows = speed.accuracy_and_latency(config.runs, config.seconds)
    if not rows:
        where = ", ".join(map(str, config.runs))
        print(f"\nno trained models in {where}: run `make demo` first for accuracy against latency")
        return []
    print(f"\ntrained models, DIGITS, one image{'top-1 %':>10}{'ms':>9}{'parameters':>12}{'million MACs':>14}")
    for row in rows:
        print(
            f"  {row['name']:<31}{row['acc1']:>10.2f}{row['median_ms']:>9.3f}"
            f"{row['parameters']:>12,}{row['macs'] / 1e6:>14.1f}"
        )
    return rows


def show_targets(rows: list[dict]) -> None:
    """The ratios worth reaching, of what was measured."""
    if rows:
        print(f"\n{'how many times as fast':<86}{'at least':>9}{'aim':>6}{'reached':>9}")
    for row in rows:
        aim = f"{row['aim']:.2f}" if "aim" in row else ""
        print(f"  {row['what']:<84}{row['at_least']:>9.2f}{aim:>6}{row['reached']:>9.2f}")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: deploy/gpu_speed.py's measures")
    parser.add_argument(
        "--output-dir", type=path, default=Path("runs/benchmark"), help="where benchmark.json and the plots go"
    )
    parser.add_argument("--seconds", type=SECONDS, default=1.5, help="measured for each group of things compared")
    parser.add_argument("--batches", type=SIZE, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument(
        "--image-size",
        type=SIZE,
        nargs="+",
        default=[224, 384, 512, 1024],
        help="sides in pixels, for cost against tokens",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=tuple(rivals.RUNTIMES),
        default=list(rivals.RUNTIMES),
        help="what whole models run in; one that is not installed is skipped",
    )
    parser.add_argument(
        "--runs",
        type=path,
        nargs="+",
        default=[Path("runs/demo")],
        help="folders of demo.py, a seed each, for accuracy against latency",
    )
    return parser


def on_gpu(parser: Parser, argv: list[str] | None, args: Namespace) -> int:
    """--device cuda: its own defaults, unless the command line says otherwise."""
    parser.refuse(argv, {"image_size", "runtimes", "runs"}, "--device cuda does not use it")
    given = {"output_dir", "seconds", "batches"} & parser.named(argv).keys()
    asked = gpu_speed.Asked(**{name: vars(args)[name] for name in given})
    return gpu_speed.run(asked, gpu_speed.machine(pick_device("cuda")))


def benchmark(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.device == "cuda":
        return on_gpu(parser, argv, args)
    check_writable(args.output_dir)
    config = pick(Config, args)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    cpu = torch.backends.cpu.get_cpu_capability()
    out = {"torch": torch.__version__, "threads": threads, "cpu": cpu, "weights": "random"}
    out["size"] = count_sizes()
    programs = compare_programs(config, threads)
    out["models"] = {f"batch {batch}, {size} px": times for (batch, size), times in programs.items()}
    out |= layer_times(config, speed.layers(197))
    out["training step"] = speed.training_steps(config.seconds)
    show("training step of a layer (forward and backward), batch 8", out["training step"], "attention")
    figures = {"tokens.png": latency_by_tokens(out["tokens"])}
    if rows := trained_models(config):
        out["accuracy"] = rows
        figures["accuracy.png"] = accuracy_by_latency(rows)
    out["reach"] = rivals.reached(programs) + speed.reached(out, threads)
    show_targets(out["reach"])
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(config.output_dir / "benchmark.json", lambda f: f.write(json.dumps(out, indent=2).encode()))
    for name, figure in figures.items():
        save_figure(figure, config.output_dir / name)
    print(f"\nwritten to {config.output_dir}: benchmark.json, {', '.join(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(benchmark))
