"""--lstm-backend auto on CUDA: kernels are compared with torch's LSTM and timed, and the fastest right one is taken."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from models import kernels
from models.kernels.gpu import tf32_allowed
from models.replace import replacements, set_backend
from utils.checkpoint import write_json
from utils.distributed import Context
from utils.errors import first_line
from utils.records import read_record
from utils.run_folder import RunFolder

KERNELS_FILE = "kernels.json"  # in a run's folder, so that a resumed run computes with the same kernels
CANDIDATES = {"cuda": ("torch", "triton")}  # by type of device; elsewhere `kernels.AUTO` decides without measuring
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative
TF32_TOLERANCE = 2e-2  # products of 8 to 11 bits, summed over hundreds of tokens; bfloat16's too
SECONDS = 0.2  # each kernel is timed


def compute(name: str, attn: nn.Module, p: Tensor, needs_grad: bool) -> list[Tensor]:
    """Hidden states of a layer's cells for p (B, N, H, d); with needs_grad the gradients of p and the weights too."""
    inputs = [t.detach().requires_grad_(needs_grad) for t in (p, *(w for cell in attn.cells() for w in cell))]
    kind = attn.direction.kind
    each = len(kind.cell._fields)
    cells = [kind.cell(*inputs[i : i + each]) for i in range(1, len(inputs), each)]
    with torch.set_grad_enabled(needs_grad):
        hidden = kernels.KERNELS[name].run(kind, inputs[0], cells)
    if not needs_grad:
        return [hidden]
    grad = torch.linspace(-1, 1, hidden.numel(), device=p.device, dtype=p.dtype).view_as(hidden)
    return [hidden.detach(), *torch.autograd.grad(hidden, inputs, grad, materialize_grads=True)]


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest; a gradient that almost cancels is held to a thousandth of the hidden states' norm instead."""
    floor = 1e-3 * expected[0].norm()
    errors = [(a - b).norm() / torch.maximum(b.norm(), floor) for a, b in zip(results, expected, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any is


def fastest(attn: nn.Module, batch: int, tokens: int, needs_grad: bool, what: str) -> str:
    """The name of the fastest kernel that gives torch's results for a layer; prints what was measured and left out."""
    task = attn.task()
    generator = torch.Generator(task.device).manual_seed(0)  # the run's own random state stays
    shape = batch, tokens, attn.num_heads, attn.width
    p = torch.randn(shape, generator=generator, device=task.device, dtype=task.dtype)
    tf32 = task.dtype == torch.float32 and task.device.type == "cuda" and tf32_allowed()
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE.get(task.dtype, TF32_TOLERANCE)
    expected, times = compute("torch", attn, p, needs_grad), {}
    for name in CANDIDATES[task.device.type]:
        if kernels.KERNELS[name].refusal(task):
            continue
        try:
            error = relative_error(compute(name, attn, p, needs_grad), expected)
            if not error <= tolerance:
                print(f"{what}: {name} is left out: off torch's by {error:.1e}, more than {tolerance:.0e}", flush=True)
                continue
            timer = Timer("compute(*args)", globals={"compute": compute, "args": (name, attn, p, needs_grad)})
            times[name] = timer.blocked_autorange(min_run_time=SECONDS).median * 1e3
        except Exception as reason:  # noqa: BLE001  (a compiler, a driver, memory: another kernel serves)
            print(f"{what}: {name} is left out: {first_line(reason)}", flush=True)
            if task.device.type == "cuda":
                torch.cuda.synchronize(task.device)  # raises where the kernel broke the GPU: no other would run either
    choice = min(times, key=times.get, default="torch")
    print(f"{what}: {choice} of {', '.join(f'{name} {ms:.3g} ms' for name, ms in times.items())}", flush=True)
    return choice


def choose_kernels(
    model: VisionTransformer,
    backend: str,
    batch: int,
    context: Context,
    run: RunFolder | None = None,
    needs_grad: bool = True,
) -> None:
    """Sets the kernel of every replacement, for so many images a step; all processes call it at once.

    Rank 0 measures what the run's folder does not name, and all take its choice. needs_grad: the model will train.
    """
    set_backend(model, backend)
    if backend != "auto" or context.device.type not in CANDIDATES:
        return
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    gpu = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    layers: dict[str, list[nn.Module]] = {}  # those that differ in nothing that decides the time
    for attn in replacements(model).values():
        if task := attn.task():
            what = f"{task.kind.name}, {task.dtype}, {attn.num_heads} heads of {task.units} units, batch {batch}"
            what += f", {tokens} tokens, {'training' if needs_grad else 'evaluation'}"
            layers.setdefault(what, []).append(attn)

    def choices() -> dict[str, str]:
        path = run.path / KERNELS_FILE if run else None
        known = read_record(path, "kernels")["kernels"] if path and path.exists() else {}
        for what, (attn, *_) in layers.items():
            key = f"{what} on {gpu}"  # rank 0's, whose choice holds for all
            if known.get(key) not in CANDIDATES[context.device.type]:
                known[key] = fastest(attn, batch, tokens, needs_grad, key)
        if path:
            write_json(path, {"kernels": known})
        return {what: known[f"{what} on {gpu}"] for what in layers}

    for what, name in (context.on_main(choices) if layers else {}).items():
        for attn in layers[what]:
            attn.backend = name
