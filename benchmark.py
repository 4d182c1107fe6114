"""FAR's speed against attention's, in one process, interleaved: layers and whole models, over batches, threads and tokens.

    python3 benchmark.py                 everything, DeiT-Tiny, random weights (speed does not depend on them)
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import utils  # noqa: F401  (first: makes torchvision importable)
from engine.count import count_macs
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.fuse import FusedBiLSTM, fuse
from models.replace import FarConfig, build, count_parameters, set_backend
from utils.arguments import SIZE, Parser
from utils.checkpoint import write_atomic
from utils.errors import FarError, run_script
from utils.figures import latency_by_tokens

KEEP = {"FAR pruned 0.5": 0.5, "FAR pruned 0.25": 0.25}


class DenseLSTM(nn.Module):
    """The published shape: one torch LSTM of width D with the heads as blocks on its diagonal, then the output projections."""

    def __init__(self, attn: MultiHeadBiLSTM):
        super().__init__()
        self.pre, self.lstm, self.post = attn.pre_proj, attn.to_dense(), attn.post_proj
        self.join = nn.Linear(2 * attn.dim, attn.dim)

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.post(self.join(self.lstm(self.pre(x))[0]))


def layers(dim: int, heads: int, tokens: int) -> dict[str, nn.Module]:
    teacher = create_teacher("DeiT-Tiny", 1000, 224).blocks[0].attn
    d = dim // heads
    far = MultiHeadBiLSTM(dim, heads, tokens)
    stock = MultiHeadBiLSTM(dim, heads, tokens)
    stock.backend = "torch"
    pruned = {name: FusedBiLSTM(MultiHeadBiLSTM(dim, heads, tokens, [(int(d * k),) * 2] * heads)) for name, k in KEEP.items()}
    return {"attention": teacher, "dense BiLSTM": DenseLSTM(far), "FAR torch": stock, "FAR": far, "FAR fused": FusedBiLSTM(far), **pruned}


def models(size: int) -> dict[str, nn.Module]:
    blocks = tuple(range(12))

    def pruned(keep: float, mlp: float = 1.0):
        units = {str(i): [[int(64 * keep)] * 2] * 3 for i in blocks}
        hidden = {str(i): int(768 * mlp) for i in blocks} if mlp < 1 else {}
        return fuse(build(FarConfig("DeiT-Tiny", 1000, size, replaced=blocks, units=units, mlp=hidden)))

    far = build(FarConfig("DeiT-Tiny", 1000, size, replaced=blocks))
    return {
        "DeiT-Tiny": create_teacher("DeiT-Tiny", 1000, size), "FAR": far,
        "FAR fused": fuse(build(FarConfig("DeiT-Tiny", 1000, size, replaced=blocks))),
        **{name: pruned(keep) for name, keep in KEEP.items()}, "FAR pruned 0.25, MLP 0.5": pruned(0.25, 0.5),
    }  # fmt: skip


def interleaved(calls: dict[str, Callable], seconds: float, least: int = 5) -> dict[str, dict[str, float]]:
    """Times all calls in turn, again and again: median, and the spread between quartiles, in milliseconds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1e3)
    result = {}
    for name, t in times.items():
        low, median, high = statistics.quantiles(t, n=4)
        result[name] = {"median_ms": median, "quartiles_ms": [low, high], "repeats": len(t)}
    return result


def memory(call: Callable) -> int:
    """Peak bytes allocated during a call, beyond what was there before it: the running sum of torch's allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def show(title: str, times: dict[str, dict], against: str) -> None:
    print(f"\n{title}")
    for name, t in times.items():
        low, high = t["quartiles_ms"]
        ratio = times[against]["median_ms"] / t["median_ms"]
        print(f"  {name:<26}{t['median_ms']:>10.3f} ms  ({low:.3f} to {high:.3f}){ratio:>8.2f}x as fast as {against}", flush=True)


def benchmark(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmark"), help="where benchmark.json and the plot go")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each group of things compared")
    parser.add_argument("--batches", type=SIZE, nargs="+", default=[1, 8, 32], help="batch sizes")
    parser.add_argument("--image-size", type=SIZE, nargs="+", default=[224, 384, 512, 768, 1024],
                        help="sides in pixels, for cost against tokens")  # fmt: skip
    args = parser.parse_args(argv)
    if any(size % 16 for size in args.image_size):
        raise FarError("--image-size: DeiT-Tiny needs multiples of its patch size, 16")
    torch.manual_seed(0)
    everyone = torch.get_num_threads()
    out: dict = {"torch": torch.__version__, "threads": everyone, "cpu": torch.backends.cpu.get_cpu_capability(), "weights": "random"}
    layer, whole = layers(192, 3, 197), models(224)
    with torch.inference_mode():
        for threads in sorted({1, everyone}, reverse=True):
            torch.set_num_threads(threads)
            for batch in args.batches:
                x = torch.randn(batch, 197, 192)
                calls = {name: lambda m=m, x=x: m(x) for name, m in layer.items()}
                out[f"layer, batch {batch}, threads {threads}"] = times = interleaved(calls, args.seconds)
                show(f"layer, DeiT-Tiny, 197 tokens, batch {batch}, threads {threads}", times, "attention")
        torch.set_num_threads(everyone)
        for batch in args.batches:
            images = torch.randn(batch, 3, 224, 224)
            calls = {name: lambda m=m, images=images: m.eval()(images) for name, m in whole.items()}
            out[f"model, batch {batch}, threads {everyone}"] = times = interleaved(calls, args.seconds, 3)
            show(f"model, 224 px, batch {batch}, threads {everyone}", times, "DeiT-Tiny")
        out["size"] = {n: {"parameters": count_parameters(m), "macs": count_macs(m)} for n, m in whole.items() if n in ("DeiT-Tiny", "FAR")}
        curve: dict[str, list] = {}
        for size in args.image_size:
            tokens = (size // 16) ** 2 + 1
            x = torch.randn(1, tokens, 192)
            calls = {name: lambda m=layer[name], x=x: m(x) for name in ("attention", "FAR fused", *KEEP)}
            times = interleaved(calls, args.seconds / 2, 3)
            show(f"layer, batch 1, {size} px, {tokens} tokens", times, "attention")
            for name, call in calls.items():
                curve.setdefault(name, []).append({"tokens": tokens, "peak_bytes": memory(call), **times[name]})
                print(f"  {name:<26}{curve[name][-1]['peak_bytes'] / 1e6:>10.1f} MB at most allocated besides")
        out["tokens"] = curve
    out["training step"] = times = training_steps(args.seconds)
    show("training step of a layer (forward and backward), batch 8", times, "attention")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(args.output_dir / "benchmark.json", lambda f: f.write(json.dumps(out, indent=2).encode()))
    figure = latency_by_tokens(curve)
    write_atomic(args.output_dir / "tokens.png", lambda f: figure.savefig(f, format="png", dpi=150))
    print(f"\nwritten to {args.output_dir}: benchmark.json, tokens.png")
    return 0


def training_steps(seconds: float) -> dict[str, dict]:
    x = torch.randn(8, 197, 192, requires_grad=True)
    trained = layers(192, 3, 197)
    set_backend(trained["FAR"], "torch")
    calls = {name: lambda m=trained[name]: m(x).sum().backward() for name in ("attention", "dense BiLSTM", "FAR")}
    return interleaved(calls, seconds, 3)


if __name__ == "__main__":
    sys.exit(run_script(benchmark))
