"""The CPU kernel, forward and backward, against the float64 reference."""

import pytest
import torch

from models import kernels
from models.bigru import GRU
from models.bilstm import MultiHeadBiLSTM
from models.kernels import cpu
from utils.errors import FarError

UNITS = [[(64, 64)] * 3, [(64, 1), (17, 40), (3, 64)], [(16, 16), (33, 5), (48, 49)]]


def layer(units, tokens=197, dim=192):
    m = MultiHeadBiLSTM(dim, len(units), tokens, units)
    for p in m.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, std=0.3)
    return m.requires_grad_(False)


def cells(m):
    return [direction.cell() for head in m.lstm for direction in head]


def watch(monkeypatch, name, note):
    """Calls `note(x)` whenever the kernel of a name runs."""
    kernel = kernels.KERNELS[name]

    def run(kind, x, cells):
        note(x)
        return kernel.run(kind, x, cells)

    monkeypatch.setitem(kernels.KERNELS, name, kernel._replace(run=run))


def error_against_float64(x, m, got):
    double = [kernels.Cell(*(w.double() for w in cell)) for cell in cells(m)]
    expected = kernels.KERNELS["reference"].run(kernels.LSTM, x.double(), double)
    return ((got - expected).norm() / expected.norm()).item()


def gradient_errors(x, m, compute):
    """Relative errors of hidden states and of every gradient of a random weighting, against the float64 reference.

    Gradients that almost cancel (a bias of one unit) are held to a thousandth of the weighting's norm instead of
    their own.
    """
    weights = [w for cell in cells(m) for w in cell]
    double = [t.detach().double().requires_grad_() for t in (x, *weights)]
    expected = kernels.KERNELS["reference"].run(
        kernels.LSTM, double[0], [kernels.Cell(*double[i : i + 4]) for i in range(1, len(double), 4)]
    )
    got, direction = compute(), torch.randn_like(expected)
    ours = torch.autograd.grad(got, [x, *weights], direction.to(got.dtype))
    theirs = torch.autograd.grad(expected, double, direction, materialize_grads=True)  # at one token W_hh has none
    pairs = [(got, expected), *zip(ours, theirs, strict=True)]
    return [((a - b).norm() / b.norm().clamp(min=1e-3 * direction.norm())).item() for a, b in pairs]


def check_that_nan_stays_in_its_head_and_image(run, device="cpu"):
    m, x = layer(UNITS[0]).to(device), torch.randn(2, 5, 3, 64, device=device)
    x[0, 2, 1, 0] = float("nan")
    bad = run(kernels.LSTM, x, cells(m)).isnan()  # (2, 5, 384)
    assert bad[0, 2:, 128:192].all() and bad[0, :3, 192:256].all()
    assert not bad[1].any() and not bad[0, :2, 128:192].any() and not bad[0, :, :128].any()


def check_that_backward_inside_autocast_is_the_same(run, device="cpu"):
    m, x = layer(UNITS[1]).to(device).requires_grad_(), torch.randn(2, 3, 3, 64, device=device, requires_grad=True)
    loss, inputs = run(kernels.LSTM, x, cells(m)).square().sum(), [x, *m.lstm.parameters()]
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


compiled_here = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
BUILDS = {"tuned": cpu.TUNED, "portable": cpu.PORTABLE}


@pytest.fixture(scope="module", params=BUILDS)
def operators(request):
    return cpu.load(BUILDS[request.param]) or pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (2, 3), (65, 33)])
def test_the_cpu_kernel_matches_the_reference_forward_and_backward(operators, units, tokens, batch):
    m = layer(units)
    x = torch.randn(batch, 3, tokens, 64).transpose(1, 2)  # not contiguous
    assert error_against_float64(x, m, cpu.fused(kernels.LSTM, x, cells(m), operators)) < 1e-6
    m.requires_grad_(), x.requires_grad_()
    assert max(gradient_errors(x, m, lambda: cpu.fused(kernels.LSTM, x, cells(m), operators))) < 1e-5


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(3, 20, 4, 64).transpose(0, 1)[:, :, :3],
        lambda: torch.randn(64, 20, 2, 3).permute(2, 1, 3, 0),
        lambda: torch.randn(2, 9, 1, 64).expand(2, 9, 3, 64),
    ],
)
def test_the_cpu_kernel_reads_strided_input(operators, view):
    m, x = layer(UNITS[1]), view()
    assert error_against_float64(x, m, cpu.fused(kernels.LSTM, x, cells(m), operators)) < 1e-6


def test_extreme_input_saturates(operators):
    m, x = layer(UNITS[0]), torch.randn(2, 12, 3, 64) * 1e4
    got = cpu.fused(kernels.LSTM, x, cells(m), operators)
    assert error_against_float64(x, m, got) < 1e-3  # gates of 1e4 are rounded to 1e-3 in float32


@pytest.mark.parametrize(
    "check", [check_that_nan_stays_in_its_head_and_image, check_that_backward_inside_autocast_is_the_same]
)
def test_the_cpu_kernel_passes_each_check(check, operators):
    check(lambda *task: cpu.fused(*task, operators))


def scale_by_raw_memory(m):
    """As a collective of torch.distributed writes: no version counter moves."""
    for p in m.parameters():
        p.detach().numpy()[...] *= 0.5


def scale_by_a_step(m):
    for p in m.requires_grad_().parameters():
        p.grad = p.detach() * 0.5
    torch.optim.SGD(m.parameters(), lr=1.0).step()
    m.requires_grad_(False)


@pytest.mark.parametrize("change", [scale_by_raw_memory, scale_by_a_step])
def test_a_layer_computes_with_the_weights_it_has_now(change):
    m, x = layer(UNITS[1]), torch.randn(1, 30, 192)
    before = m(x)
    change(m)
    after, m.backend = m(x), "reference"
    torch.testing.assert_close(after, m(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-3)


def test_auto_takes_the_cpu_kernel_only_where_it_fits():
    task = kernels.Task(kernels.LSTM, torch.device("cpu"), torch.float32, 64)
    assert kernels.choose("auto", task) == ("cpu" if cpu.available() else "torch")
    others = [task._replace(dtype=torch.float64), task._replace(dtype=torch.bfloat16), task._replace(kind=GRU)]
    for other in (*others, task._replace(device=torch.device("meta"))):
        assert kernels.choose("auto", other) == "torch"
        with pytest.raises(FarError, match="--lstm-backend cpu"):
            kernels.choose("cpu", other)


def test_a_run_that_leaves_the_kernel_open_builds_none_before_it_needs_one(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda flags: pytest.fail("built"))
    kernels.check("auto", torch.device("cpu"))


@compiled_here
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.bfloat16), ("torch", torch.float16), ("reference", torch.bfloat16)]
)
def test_gates_and_state_keep_their_precision_under_autocast(dtype, backend, monkeypatch):
    seen = []
    watch(monkeypatch, backend, lambda x: seen.append((x.dtype, torch.is_autocast_enabled("cpu"))))
    m, x = layer(UNITS[1]).requires_grad_(), torch.randn(2, 30, 192)
    expected, m.backend = m(x), backend
    seen.clear()
    with torch.autocast("cpu", dtype):
        got = m(x)
        got.float().square().mean().backward()  # inside: backward keeps its precision too
    assert seen == [(torch.float32, False)]
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in m.parameters())


@pytest.mark.parametrize(("weights", "products"), [(["weight_hh"], 6), (["bias_ih"], 0), (["x", "weight_ih"], 12)])
def test_backward_multiplies_only_for_the_gradients_it_needs(operators, weights, products):
    m, x = layer(UNITS[1]), torch.randn(2, 9, 3, 64)
    inputs = {"x": x, **dict(m.lstm.named_parameters())}
    chosen = [p.requires_grad_() for name, p in inputs.items() if name.split(".")[-1] in weights]
    with torch.autograd.profiler.profile() as record:
        got = torch.autograd.grad(cpu.fused(kernels.LSTM, x, cells(m), operators).square().sum(), chosen)
    assert sum(event.name == "aten::mm" for event in record.function_events) == products
    everything = cpu.fused(kernels.LSTM, x.requires_grad_(), cells(m.requires_grad_()), operators).square().sum()
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(everything, chosen), strict=True))


def test_the_cpu_kernel_says_that_it_has_no_second_derivatives(operators):
    m, x = layer(UNITS[1]), torch.randn(2, 9, 3, 64, requires_grad=True)
    (first,) = torch.autograd.grad(cpu.fused(kernels.LSTM, x, cells(m), operators).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), x)


@compiled_here
def test_the_operators_keep_what_torch_asks_of_operators():
    m, x, operators = layer([(17, 1), (16, 3)], dim=32), torch.randn(2, 7, 2, 16, requires_grad=True), torch.ops.far
    weights = [w.requires_grad_() for cell in cells(m) for w in cell]
    torch.library.opcheck(operators.train.default, (x, weights))
    with torch.no_grad():
        torch.library.opcheck(operators.forward.default, (x, weights))
        hidden, gates, states = operators.train(x, weights)
        wanted = [False, True, False, True] + [False] * 9
        arguments = (torch.randn_like(hidden), x.detach(), [w.detach() for w in weights], hidden, gates, states, wanted)
        torch.library.opcheck(operators.backward.default, arguments)


@compiled_here
@pytest.mark.parametrize("train", [False, True])
def test_a_layer_compiles_and_exports_as_one_graph(train):
    m, x = layer(UNITS[1], tokens=9).train(train).requires_grad_(train), torch.randn(2, 9, 192)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m(x))
    if train:
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), list(m.parameters())) for f in (compiled, m))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    exported = torch.export.export(m, (x,))
    torch.testing.assert_close(exported.module()(x), m(x))
    parts = [part for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any(str(node.target).startswith("far.") for part in parts for node in part.graph.nodes)
