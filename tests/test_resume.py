"""A run goes on from what a run like it wrote, and from nothing else."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from engine.resume import check, check_position, load_optimizer, load_scaler
from engine.stages import Optim, Stage
from engine.train import Position
from models.replace import FarConfig, build, pack
from utils import checkpoint
from utils.errors import FarError
from utils.records import read_lines, read_record

FILE = "--resume last.pth"
STAGES = [
    Stage(name, (0, 2), (0, 2), "block", "classification", "output", Optim(epochs, 8, 1e-3, accum_steps=accum))
    for name, epochs, accum in (("attn", 2, 2), ("block", 1, 1))
]
BATCHES = {"attn": 5, "block": 3}
SUMS = {"images": 64.0, "loss": 80.5, "similarity": 3.0}
FAR = FarConfig("DeiT-Micro", 10, 32, replaced=(0, 2), units={"2": [[3, 32], [32, 1]]}, mlp={"1": 40})
HOSTILE = [None, True, 0, -1, 1.0, math.nan, 10**300, "x", (), [], {}, {1: 2}, torch.ones(2)]
HALFWAY = {"stage": 0, "epoch": 1, "step": 4, "best": 91.5, "best_loss": 0.25, "sums": SUMS}


EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def content(config=FAR):
    """A checkpoint's content, weights fresh random numbers."""
    return pack(build(config), config)


def write(path, value):
    checkpoint.save(path, value)
    return path


def places(value, path=()):
    """Every place in nested plain data, as keys from the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [path, *(place for key, child in items for place in places(child, (*path, key)))]


def changed(value, place, new):
    """A copy with something else in one place; Ellipsis takes it out."""
    if not place:
        return new
    key, *rest = place
    inner = changed(value[key], rest, new)
    if isinstance(value, dict):
        return {k: inner if k == key else v for k, v in value.items() if not (k == key and inner is Ellipsis)}
    return [inner if i == key else v for i, v in enumerate(value) if not (i == key and inner is Ellipsis)]


def batches(stage):
    return BATCHES[stage.name]


def line_of(call, *args):
    """The one line an unusable file gives."""
    with pytest.raises(FarError) as caught:
        call(*args)
    line = str(caught.value)
    assert line.startswith(f"{FILE}: ") and line.endswith("start again with another --output-dir"), line
    return line


def test_a_position_of_an_earlier_version_has_no_best_loss():
    older = {name: value for name, value in HALFWAY.items() if name != "best_loss"}
    assert check_position(older, STAGES, batches, FILE) == older and Position(**older).best_loss == 0.0


def test_a_position_is_accepted_exactly_where_a_run_can_stop():
    # All steps done is an epoch whose evaluation was interrupted.
    reachable = {(0, 0, s) for s in (0, 2, 4, 5)} | {(0, 1, s) for s in (0, 2, 4, 5)} | {(0, 2, 0)}
    reachable |= {(1, 0, s) for s in (0, 1, 2, 3)} | {(1, 1, 0), (2, 0, 0)}
    assert vars(Position()).keys() == HALFWAY.keys()
    for stage, epoch, step in itertools.product(range(-1, 4), range(-1, 4), range(-1, 7)):
        sums = {"images": 8.0, "loss": 1.0} if step > 0 else {}
        position = {**vars(Position()), "stage": stage, "epoch": epoch, "step": step, "sums": sums}
        try:
            assert check_position(position, STAGES, batches, FILE) == position
            assert (stage, epoch, step) in reachable
        except FarError:
            assert (stage, epoch, step) not in reachable


@pytest.mark.parametrize(
    "change",
    [
        *(
            {name: value}
            for name in ("stage", "epoch", "step")
            for value in (True, 1.0, "1", None, 10**300, math.nan, [1])
        ),
        *({"best": value} for value in (math.nan, math.inf, -2.0, 101.0, "9", None, 10**400, True, [1.0])),
        *({"best_loss": value} for value in (math.nan, -math.inf, "9", None, 1, True)),
        *(
            {"sums": value}
            for value in ({}, None, [1.0], {"loss": 1.0}, {"images": 8.0}, {1: 2.0}, {"images": 0.0, "loss": 1.0})
        ),
        *({"sums": {"images": 8.0, "loss": value}} for value in (math.nan, -math.inf, 1, "1", [1.0], torch.ones(1))),
        {"surprise": 1},
        {"step": 0},
    ],
)
def test_a_position_that_no_run_writes_is_one_line(change):
    assert "position" in line_of(check_position, {**HALFWAY, **change}, STAGES, batches, FILE)


@EXAMPLES
@given(data=st.data())
def test_any_change_of_a_position_gives_one_that_a_run_can_have_or_one_line(data):
    position = HALFWAY
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(position)[1:] or [()]))
        position = changed(position, place, data.draw(st.sampled_from([*HOSTILE, ..., 2, 0.5, -1.0])))
    try:
        at = Position(**check_position(position, STAGES, batches, FILE))
    except FarError as error:
        assert str(error).startswith(FILE)
    else:
        numbers = [at.stage, at.epoch, at.step, at.best, at.best_loss, *at.sums.values()]
        assert not any(isinstance(v, bool) for v in numbers) and all(map(math.isfinite, numbers))
        assert at.epoch <= (STAGES[at.stage].optim.epochs if at.stage < 2 else 0) and bool(at.step) == bool(at.sums)


def last(**changes):
    return {**content(FAR), "optimizer": {}, "scaler": {}, "position": HALFWAY, **changes}


def test_last_of_a_run_gives_its_position_and_anything_else_one_line(tmp_path):
    loaded = checkpoint.load(write(tmp_path / "last.pth", last()))
    assert check(loaded, FAR, STAGES, batches, FILE) == HALFWAY
    best = {k: v for k, v in loaded.items() if k in ("model", "config")}
    assert "no run's last.pth" in line_of(check, best, FAR, STAGES, batches, FILE)
    for name in ("position", "optimizer", "scaler"):
        for value in (None, [], "x"):
            assert name in line_of(check, {**loaded, name: value}, FAR, STAGES, batches, FILE)
    other = FarConfig("DeiT-Micro", 11, 32)
    assert "num_classes is 10, this run's 11" in line_of(check, loaded, other, STAGES, batches, FILE)
    plain = last(**content(FarConfig("DeiT-Micro", 10, 32, replaced=(0,))))
    assert "[2] are not replaced" in line_of(check, plain, FAR, STAGES, batches, FILE)


# ---- optimizer and scaler


def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))


def make(model, opt, lr=1e-2):
    kwargs = {"momentum": 0.9} if opt == "sgd" else {}
    optimizer = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=0.05, **kwargs)
    create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    return optimizer


def update(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.param_groups[0]["lr"] *= 0.9
    optimizer.step()


def trained(opt="adamw", steps=3):
    model = net()
    optimizer = make(model, opt)
    for _ in range(steps):
        update(model, optimizer, random.randrange(10**6))
    return model, optimizer, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize(
    "opt", ["adamw", "sgd", "momentum", "lamb", "adafactor", "adan", "radam", "laprop", "lion", "nadamlegacy"]
)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(opt, steps, tmp_path):
    model, optimizer, state = trained(opt, steps)
    state = checkpoint.load(write(tmp_path / "a.pth", state))
    again = net()
    again.load_state_dict(model.state_dict())
    resumed = make(again, opt)
    load_optimizer(resumed, state, FILE)
    assert all(
        torch.equal(a, b) and b.grad is None for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    for m, o in ((model, optimizer), (again, resumed)):
        update(m, o, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def put(state, value, *path):
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("state",), [], "other parts"),
        (("param_groups",), {}, "other parts"),
        (("surprise",), 1, "other parts"),
        (("param_groups", 0), [], "group 0"),
        (("param_groups", 0, "surprise"), 1, "group 0"),
        (("param_groups", 0, "params"), [0, 1, 2, 3], "params"),
        (("param_groups", 0, "params"), [0, 2, 1], "params"),
        (("param_groups", 0, "lr"), "0.1", "lr"),
        (("param_groups", 0, "lr"), -1.0, "lr"),
        (("param_groups", 0, "lr"), math.nan, "lr"),
        (("param_groups", 0, "lr"), torch.tensor(0.1), "lr"),
        (("param_groups", 0, "initial_lr"), 0.5, "initial_lr"),
        (("param_groups", 0, "betas"), (0.9, 0.99), "betas"),
        (("param_groups", 0, "betas"), 0.9, "betas"),
        (("param_groups", 0, "betas"), (0.9,), "betas"),
        (("param_groups", 0, "amsgrad"), 0, "amsgrad"),
        (("param_groups", 0, "amsgrad"), True, "amsgrad"),
        (("param_groups", 1, "weight_decay"), 0.06, "weight_decay"),
        (("state", 9), {}, "other parameters"),
        (("state", "0"), {}, "other parameters"),
        (("state", True), {}, "other parameters"),
        (("state", 0), [], "parameter 0"),
        (("state", 0), {}, "parameter 0"),
        (("state", 0, "surprise"), 1, "parameter 0"),
        (("state", 0, "step"), 3, "step"),
        (("state", 0, "step"), torch.tensor(-3.0), "step"),
        (("state", 0, "step"), torch.tensor(math.inf), "step"),
        (("state", 0, "exp_avg"), torch.ones(7), "exp_avg of parameter 0 has shape"),
        (("state", 0, "exp_avg"), torch.full((6,), math.nan), "exp_avg of parameter 0 holds NaN"),
        (("state", 0, "exp_avg"), torch.ones(6, dtype=torch.int64), "exp_avg"),
        (("state", 0, "exp_avg"), torch.ones(6).to_sparse(), "exp_avg"),
        (("state", 0, "exp_avg"), None, "exp_avg"),
        (("state", 0, "exp_avg"), [1.0] * 6, "exp_avg"),
    ],
)
def test_an_optimizer_state_that_this_run_cannot_have_written_is_one_line(path, value, said):
    model, _, state = trained()
    if path == ("state", True):
        del state["state"][1]  # True is 1 to a dictionary
    put(state, value, *path)
    optimizer = make(model, "adamw")
    before = copy.deepcopy(optimizer.state_dict())
    assert said in line_of(load_optimizer, optimizer, state, FILE)
    assert optimizer.state_dict() == before


def test_a_parameter_without_a_state_is_refused_unless_no_gradient_reaches_it():
    model, _, state = trained()
    bias = model[0].bias
    optimizer = make(model, "adamw")
    index = next(i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]) if p is bias)
    del state["state"][index]
    assert "other parameters" in line_of(load_optimizer, optimizer, state, FILE)
    load_optimizer(make(model, "adamw"), state, FILE, idle=[bias])
    del state["param_groups"][1]
    assert "1 groups, this run's 2" in line_of(load_optimizer, make(model, "adamw"), state, FILE)
    assert "other" in line_of(load_optimizer, make(model, "sgd"), trained()[2], FILE)


def test_a_scaler_goes_on_with_its_scale_and_anything_else_is_one_line():
    saved = {**torch.amp.GradScaler("cpu").state_dict(), "scale": 1024.0, "_growth_tracker": 17}
    scaler = torch.amp.GradScaler("cpu")
    load_scaler(scaler, saved, FILE)
    assert scaler.state_dict() == saved
    load_scaler(torch.amp.GradScaler("cpu", enabled=False), {}, FILE)
    for change in (
        *({"scale": value} for value in (0.0, -1.0, math.nan, math.inf, "1", 1024, True, torch.ones(1))),
        *({"_growth_tracker": value} for value in (-1, 1.0, True, "1", 10**30)),
        *({"growth_factor": 3.0}, {"backoff_factor": "0.5"}, {"growth_interval": 2000.0}, {"surprise": 1}),
    ):
        assert "scaler" in line_of(load_scaler, torch.amp.GradScaler("cpu"), {**saved, **change}, FILE)
    assert "--amp" in line_of(load_scaler, torch.amp.GradScaler("cpu"), {}, FILE)
    assert "--amp" in line_of(load_scaler, torch.amp.GradScaler("cpu", enabled=False), saved, FILE)


# ---- text files

ROWS = [{"stage_index": s, "epoch": e, "loss": 0.1 * e} for s in range(2) for e in range(3)]


def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == ([], False)
    raw = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        assert read_lines(path) == (ROWS[: raw[:size].count(b"\n")], size > 0 and raw[size - 1 : size] != b"\n")
    path.write_bytes(raw + b'{"stage_index": 1\n')
    assert read_lines(path) == (ROWS, True)


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"[]",
        b"3",
        b"",
        b"\xff",
        b'{"epoch": 1}',
        b'{"stage_index": true, "epoch": 1}',
        b"[" * 99999,
        b'{"stage_index": 1.0, "epoch": 1}',
        b'{"stage_index": ' + b"9" * 5000 + b', "epoch": 1}',
    ],
)
def test_damage_inside_a_log_is_told_by_line(damage, tmp_path):
    path = tmp_path / "log.jsonl"
    raw = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([raw[0], damage, *raw[1:]]) + b"\n")
    with pytest.raises(FarError, match=f"^{path}: line 2 is damaged; "):
        read_lines(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"null", b"{}", b'{"args": 3}', b'{"args": []}', b"\xff", b"[" * 99999]
)
def test_a_record_that_is_none_is_one_line(text, tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes(b'{"args": {"seed": 1}}')
    assert read_record(path) == {"args": {"seed": 1}}
    path.write_bytes(text)
    for wrong in (path, tmp_path, tmp_path / "missing.json"):
        with pytest.raises(FarError, match=f"^{wrong}: .*--output-dir$"):
            read_record(wrong)
