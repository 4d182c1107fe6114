"""FAR's speed against attention's, in one process, interleaved: layers and whole models, by batch, threads, tokens.

python3 benchmark.py                 everything, DeiT-Tiny, random weights (speed does not depend on them)
"""

import json
import sys
from pathlib import Path

import torch

from engine import speed
from engine.count import count_macs
from models import kernels
from models.replace import count_parameters
from utils.arguments import SECONDS, SIZE, Parser, path
from utils.checkpoint import write_atomic
from utils.errors import FarError, run_script
from utils.figures import accuracy_by_latency, latency_by_tokens
from utils.files import check_writable


def show(title: str, times: speed.Times, against: str) -> None:
    print(f"\n{title}")
    for name, t in times.items():
        low, high = t["quartiles_ms"]
        ratio = times[against]["median_ms"] / t["median_ms"]
        print(
            f"  {name:<26}{t['median_ms']:>10.3f} ms  ({low:.3f} to {high:.3f}){ratio:>8.2f}x as fast as {against}",
            flush=True,
        )


def by_batch(
    kind: str, things: dict, shape: tuple[int, ...], args, threads: int, against: str
) -> dict[str, speed.Times]:
    """Times of all things at each batch size, `shape` being one sample's."""
    torch.set_num_threads(threads)
    found = {}
    for batch in args.batches:
        x = torch.randn(batch, *shape)
        calls = {name: lambda m=m, x=x: m.eval()(x) for name, m in things.items()}
        title = f"{kind}, batch {batch}, threads {threads}"
        found[title] = speed.interleaved(calls, args.seconds, 3)
        show(title, found[title], against)
    return found


def by_tokens(things: dict, args) -> dict[str, list[dict]]:
    """Time and extra memory of a layer over image sizes, batch 1."""
    curve: dict[str, list[dict]] = {}
    for size in args.image_size:
        tokens = (size // 16) ** 2 + 1
        x = torch.randn(1, tokens, speed.DIM)
        calls = {name: lambda m=things[name], x=x: m(x) for name in ("attention", "FAR fused", *speed.KEEP)}
        times = speed.interleaved(calls, args.seconds / 2, 3)
        show(f"layer, batch 1, {size} px, {tokens} tokens", times, "attention")
        for name, call in calls.items():
            curve.setdefault(name, []).append({"tokens": tokens, "peak_bytes": speed.peak_bytes(call), **times[name]})
            print(f"  {name:<26}{curve[name][-1]['peak_bytes'] / 1e6:>10.1f} MB at most allocated besides")
    return curve


def benchmark(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir", type=path, default=Path("runs/benchmark"), help="where benchmark.json and the plots go"
    )
    parser.add_argument("--seconds", type=SECONDS, default=4.0, help="measured for each group of things compared")
    parser.add_argument("--batches", type=SIZE, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument(
        "--image-size",
        type=SIZE,
        nargs="+",
        default=[224, 384, 512, 768, 1024],
        help="sides in pixels, for cost against tokens",
    )
    parser.add_argument(
        "--runs",
        type=path,
        nargs="+",
        default=[Path("runs/demo")],
        help="folders of demo.py, a seed each, for accuracy against latency",
    )
    args = parser.parse_args(argv)
    check_writable(args.output_dir)
    if any(size % 16 for size in args.image_size):
        raise FarError("--image-size: DeiT-Tiny needs multiples of its patch size, 16")
    torch.manual_seed(0)
    everyone = torch.get_num_threads()
    out: dict = {
        "torch": torch.__version__,
        "threads": everyone,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "weights": "random",
    }
    layers, models = speed.layers(197), speed.models(224)
    out["size"] = {name: {"parameters": count_parameters(m), "macs": count_macs(m)} for name, m in models.items()}
    print(f"{'model, 224 px, random weights':<30}{'parameters':>12}{'million MACs':>14}")
    for name, size in out["size"].items():
        print(f"  {name:<28}{size['parameters']:>12,}{size['macs'] / 1e6:>14,.0f}")
    with torch.inference_mode():
        for threads in sorted({1, everyone}):
            out |= by_batch("layer", layers, (197, speed.DIM), args, threads, "attention")
        if kernels.cpu.available():
            out["packing"] = speed.packing(layers["FAR"], args.seconds / 2)
            pack_ms, call_ms = (out["packing"][name]["median_ms"] for name in ("packing", "call"))
            print(
                f"\npacking the weights of a layer: {pack_ms:.3f} ms, {100 * pack_ms / call_ms:.1f} "
                f"% of a call at batch 1"
            )
        out |= by_batch("model", models, (3, 224, 224), args, everyone, speed.NAME)
        out["tokens"] = by_tokens(layers, args)
    out["training step"] = speed.training_steps(args.seconds)
    show("training step of a layer (forward and backward), batch 8", out["training step"], "attention")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figures = {"tokens.png": latency_by_tokens(out["tokens"])}
    if rows := speed.accuracy_and_latency(args.runs, args.seconds):
        out["accuracy"] = rows
        print(f"\ntrained models, DIGITS, one image{'top-1 %':>10}{'ms':>9}{'parameters':>12}{'million MACs':>14}")
        for row in rows:
            print(
                f"  {row['name']:<31}{row['acc1']:>10.2f}{row['median_ms']:>9.3f}"
                f"{row['parameters']:>12,}{row['macs'] / 1e6:>14.1f}"
            )
        figures["accuracy.png"] = accuracy_by_latency(rows)
    else:
        print(
            f"\nno trained models in {', '.join(map(str, args.runs))}: run `make demo` first for "
            f"accuracy against latency"
        )
    if targets := speed.reached(out, everyone):
        out["reach"] = targets
        print(f"\n{'how many times as fast':<62}{'at least':>9}{'reached':>9}")
        for row in targets:
            print(f"  {row['what']:<60}{row['at_least']:>9.2f}{row['reached']:>9.2f}")
    write_atomic(args.output_dir / "benchmark.json", lambda f: f.write(json.dumps(out, indent=2).encode()))
    for name, figure in figures.items():
        write_atomic(args.output_dir / name, lambda f, figure=figure: figure.savefig(f, format="png", dpi=150))
    print(f"\nwritten to {args.output_dir}: benchmark.json, {', '.join(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(benchmark))
