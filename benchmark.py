"""FAR's speed against attention's: whole models in the runtimes people deploy, and layers, by batch and tokens.

python3 benchmark.py                 everything, random weights (speed does not depend on them)
python3 benchmark.py --quick         DeiT-Tiny alone
python3 benchmark.py --device cuda   layers and models on a GPU, by every kernel beside attention (`make gpu`)
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from deploy import gpu_speed, rivals, speed
from deploy.packed import PRECISIONS
from deploy.timing import Times, compare, peak_bytes
from models.count import count_macs
from models.deit import LARGEST_INPUT, fits_patches
from models.replace import count_parameters
from plots.figures import accuracy_by_latency, latency_by_tokens, save_figure
from utils.arguments import SECONDS, SIZE, Parser, flag, path, pick
from utils.checkpoint import write_json
from utils.distributed import pick_device
from utils.errors import FarError
from utils.files import check_writable
from utils.script import run_script
from utils.terminal import table

option = partial(flag, group="options")  # argparse's own group


@dataclass(frozen=True)
class Config:
    """The flags."""

    device: str = option("cuda: deploy/gpu_speed.py's measures", "cpu", choices=("cpu", "cuda"))
    output_dir: Path = option("where benchmark.json and the plots go", Path("runs/benchmark"), type=path)
    seconds: float = option("measured for each group of things compared", 1.5, type=SECONDS)
    batches: Sequence[int] = option("batch sizes", (1, 8, 32), type=SIZE, nargs="+")
    image_size: Sequence[int] = option(
        "sides in pixels, for cost against tokens", (224, 384, 512, 1024), type=SIZE, nargs="+"
    )
    runtimes: Sequence[str] = option(
        "what whole models run in; one that is not installed is skipped",
        tuple(rivals.RUNTIMES),
        nargs="+",
        choices=tuple(rivals.RUNTIMES),
    )
    quick: bool = option("leave DeiT-Small and DeiT-Base out", False)
    runs: Sequence[Path] = option(
        "folders of demo.py, a seed each, for accuracy against latency", (Path("runs/demo"),), type=path, nargs="+"
    )

    def __post_init__(self):
        if odd := [size for size in self.image_size if not fits_patches(rivals.BASE, size)]:
            raise FarError(f"--image-size {odd[0]}: {rivals.BASE} needs a multiple of 16 up to {LARGEST_INPUT}")


def show(title: str, times: Times, megabytes: dict[str, float] | None = None) -> None:
    """Prints times beside attention's, which is among them."""
    rows = [[title, "median ms", "quartiles", "times as fast as attention", *["peak MB"] * bool(megabytes)]]
    for name, t in times.items():
        low, high = t["quartiles_ms"]
        ratio = times["attention"]["median_ms"] / t["median_ms"]
        rows.append([name, f"{t['median_ms']:.3f}", f"{low:.3f} to {high:.3f}", f"{ratio:.2f}"])
        rows[-1] += [f"{megabytes[name]:.1f}"] if megabytes else []
    print(f"\n{table(rows)}", flush=True)


def compare_programs(config: Config, threads: int) -> dict[tuple[int, int], Times]:
    """Times of whole models at (batch, size), each runtime in a process of its own, in turns."""
    programs, results = rivals.programs(config.runtimes, larger=not config.quick), {}
    for program in programs:
        if reason := program.lacks():
            print(f"skipped: {program}: {reason}")
    shapes = [(batch, 224) for batch in config.batches] + [(1, size) for size in config.image_size if size != 224]
    with tempfile.TemporaryDirectory() as folder:
        able = [program for program in programs if not program.lacks()]
        with contextlib.closing(rivals.Processes(able, threads, folder)) as processes:
            for batch, size in tqdm(shapes, desc="shapes", unit="shape", leave=False, disable=None):
                chosen = [program for program in able if program.timed_at(batch, size)]
                results[batch, size] = processes.compare(chosen, batch, size, config.seconds / 15)
                for program, reason in processes.failed.items():
                    print(f"failed at batch {batch}, {size} px: {program}: {reason}", flush=True)
    rows = [[f"whole models, {threads} threads, median ms", *(f"{b} x {s} px" for b, s in shapes)]]
    for name in dict.fromkeys(name for times in results.values() for name in times):
        rows.append([name, *(f"{t[name]['median_ms']:.2f}" if name in t else "" for t in results.values())])
    print(f"\n{table(rows)}", flush=True)
    for precision in PRECISIONS:
        show_ratios(programs, results, precision)
    return results


def show_ratios(programs: list[rivals.Program], results: dict[tuple[int, int], Times], precision: str) -> None:
    """Prints how many times as fast as OpenVINO's attention of the same size the models in our engine are."""
    rows = [[f"times as fast as OpenVINO's DeiT, {precision}", *(f"{b} x {s} px" for b, s in results)]]
    for program in programs:
        if program[1:] == (rivals.OURS, precision):
            rival = str(rivals.Program(rivals.VARIANTS[program.model].base, rivals.OPENVINO, precision))
            pairs = [(times.get(rival), times.get(str(program))) for times in results.values()]
            ratios = [
                f"{rival['median_ms'] / ours['median_ms']:.2f}" if rival and ours else "" for rival, ours in pairs
            ]
            rows += [[program.model, *ratios]] * any(ratios)
    if len(rows) > 1:
        print(f"\n{table(rows)}", flush=True)


@torch.inference_mode()
def compare_layers(config: Config, threads: int) -> dict[str, Times | dict[str, list[dict]]]:
    """Times of layers by batch at 197 tokens, and time and memory by the number of tokens for one image."""
    layers = {name: layer.eval() for name, layer in speed.layers(197).items()}
    results, curve = {}, {}
    for batch in config.batches:
        x = torch.randn(batch, 197, rivals.DIM)
        title = f"layer, batch {batch}, threads {threads}"
        results[title] = compare({name: partial(layer, x) for name, layer in layers.items()}, config.seconds)
        show(title, results[title])
    for size in config.image_size:
        tokens = (size // 16) ** 2 + 1
        x = torch.randn(1, tokens, rivals.DIM)
        calls = {name: partial(layers[name], x) for name in ("attention", "FAR fused", *speed.KEEP)}
        times = compare(calls, config.seconds / 2)
        for name, call in calls.items():
            curve.setdefault(name, []).append({"tokens": tokens, "peak_bytes": peak_bytes(call), **times[name]})
        megabytes = {name: points[-1]["peak_bytes"] / 1e6 for name, points in curve.items()}
        show(f"layer, batch 1, {size} px, {tokens} tokens", times, megabytes)
    return results | {"tokens": curve}


def compare_training(config: Config) -> Times:
    """Times of forward and backward of a layer, batch 8, 197 tokens."""
    x, layers = torch.randn(8, 197, rivals.DIM, requires_grad=True), speed.layers(197)
    names = ("attention", "dense BiLSTM", "FAR torch", "FAR")
    return compare({name: lambda m=layers[name]: m(x).sum().backward() for name in names}, config.seconds)


def benchmark(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_flags(Config)
    args = parser.parse_args(argv)
    if args.device == "cuda":  # has defaults of its own
        parser.refuse(argv, {"image_size", "runtimes", "runs", "quick"}, "--device cuda does not use it")
        given = {"output_dir", "seconds", "batches"} & parser.named(argv).keys()
        return gpu_speed.run(gpu_speed.GpuConfig(**{name: vars(args)[name] for name in given}), pick_device("cuda"))
    check_writable(args.output_dir)
    config = pick(Config, args)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    sizes = {}
    for name, variant in rivals.variants(larger=not config.quick).items():
        model = variant.build(224)
        sizes[name] = {"parameters": count_parameters(model), "macs": count_macs(model)}
    rows = [[name, f"{size['parameters']:,}", f"{size['macs'] / 1e6:,.0f}"] for name, size in sizes.items()]
    print(table([["224 px, random weights", "parameters", "million MACs"], *rows]))
    programs = compare_programs(config, threads)
    cpu = torch.backends.cpu.get_cpu_capability()
    out = {"torch": torch.__version__, "threads": threads, "cpu": cpu, "weights": "random", "size": sizes}
    out["models"] = {f"batch {batch}, {size} px": times for (batch, size), times in programs.items()}
    out |= compare_layers(config, threads)
    out["training step"] = compare_training(config)
    show("training step of a layer, batch 8", out["training step"])
    figures = {"tokens.png": latency_by_tokens(out["tokens"])}
    if trained := speed.accuracy_and_latency(config.runs, config.seconds):
        out["accuracy"], figures["accuracy.png"] = trained, accuracy_by_latency(trained)
        heads = ["trained models, DIGITS, one image", "top-1 %", "ms", "parameters", "million MACs"]
        rows = [
            [r["name"], f"{r['acc1']:.2f}", f"{r['median_ms']:.3f}", f"{r['parameters']:,}", f"{r['macs'] / 1e6:.1f}"]
            for r in trained
        ]
        print(f"\n{table([heads, *rows])}")
    else:
        where = ", ".join(map(str, config.runs))
        print(f"\nno trained models in {where}: run `make demo` first for accuracy against latency")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.output_dir / "benchmark.json", out)
    for name, figure in figures.items():
        save_figure(figure, config.output_dir / name)
    print(f"\nwritten to {config.output_dir}: benchmark.json, {', '.join(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(benchmark))
