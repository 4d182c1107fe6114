"""What a stopped run left in last.pth, checked before the run goes on from it."""

import copy
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engine.stages import Stage
from models.replace import FarConfig, read_config
from utils.checkpoint import check_dense, check_tensor, is_int
from utils.errors import FarError

POSITION = {"stage", "epoch", "step", "best", "sums"}  # the fields of engine.train.Position
NEWER = {"best_loss"}  # that earlier versions did not store
LARGEST = sys.float_info.max
MEND = "start again with another --output-dir"


def real(value: Any, low: float, high: float = LARGEST) -> bool:
    """Whether a value from a file is a finite float (no bool, no integer) in low..high."""
    return type(value) is float and low <= value <= high


def require(right: bool, source: str, what: str) -> None:
    if not right:
        raise FarError(f"{source}: {what}; {MEND}")


def check(
    content: dict[str, Any], config: FarConfig, stages: list[Stage], batches: Callable[[Stage], int], source: str
) -> dict[str, Any]:
    """Returns the fields of the position that last.pth stores.

    Args:
        content: of last.pth.
        config: of the run that goes on.
        stages: of the run that goes on; the position must lie in them.
        batches: steps in an epoch of a stage, a process.
        source: what errors begin with, `--resume FILE`.

    Raises:
        FarError: another run's, or not what a run writes.
    """
    for name in ("position", "optimizer", "scaler"):
        require(isinstance(content.get(name), dict), source, f"holds no {name}, so it is no run's last.pth")
    stored = read_config(content, source)
    for name in ("base_model", "num_classes", "img_size", "rep_by"):
        ours, theirs = getattr(config, name), getattr(stored, name)
        require(ours == theirs, source, f"its {name} is {theirs}, this run's {ours}")
    position = check_position(content["position"], stages, batches, source)
    stage = stages[min(position["stage"], len(stages) - 1)]
    lacking = set(stage.swapped) - set(stored.replaced)
    require(not lacking, source, f"blocks {sorted(lacking)} are not replaced, as stage {stage.name} has them")
    return position


def check_position(
    position: dict[str, Any], stages: list[Stage], batches: Callable[[Stage], int], source: str
) -> dict[str, Any]:
    """The position, where a run of these stages can have stopped there; arguments and errors as in `check`."""
    right = set(position) - NEWER == POSITION
    require(right, source, f"its position holds other fields than {', '.join(sorted(POSITION | NEWER))}")
    index, epoch, step, sums = (position[name] for name in ("stage", "epoch", "step", "sums"))
    require(is_int(index, 0, len(stages)), source, f"its position's stage is no number from 0 to {len(stages)}")
    epochs = stages[index].optim.epochs if index < len(stages) else 0
    require(is_int(epoch, 0, epochs), source, f"its position's epoch is no number from 0 to {epochs}")
    accum = stages[index].optim.accum_steps if epoch < epochs else 1
    last = batches(stages[index]) if epoch < epochs else 0  # an evaluated epoch is stored as the next one's step 0
    right = is_int(step, 0, last) and (step % accum == 0 or step == last)
    require(right, source, f"its position's step is no multiple of {accum} from 0 to {last}")
    require(real(position["best"], -1.0, 100.0), source, "its position's best is no number from -1 to 100")
    require(real(position.get("best_loss", 0.0), -LARGEST), source, "its position's best_loss is not finite")
    right = isinstance(sums, dict) and all(isinstance(k, str) and real(v, -LARGEST) for k, v in sums.items())
    require(right, source, "its position's sums are not finite numbers")
    right = real(sums.get("images"), 1.0) and "loss" in sums if step else not sums
    require(right, source, "its position's sums are not those of the epoch's steps so far")
    return position


def load_scaler(scaler: torch.amp.GradScaler, state: dict[str, Any], source: str) -> None:
    """`load_state_dict` of a state that a scaler with the same settings wrote (an empty one where it is off)."""
    own = scaler.state_dict()
    require(set(state) == set(own), source, "its scaler is not that of this run's --amp")
    if own:
        right = real(state["scale"], sys.float_info.min) and is_int(state["_growth_tracker"], 0, own["growth_interval"])
        require(right, source, "its scaler's scale or growth tracker is no number that a scaler can have")
        fixed = [name for name in own if name not in ("scale", "_growth_tracker")]
        right = all(type(state[name]) is type(own[name]) and state[name] == own[name] for name in fixed)
        require(right, source, f"its scaler's {', '.join(fixed)} are not this run's")
        scaler.load_state_dict(state)


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str, idle: Iterable[Tensor] = ()
) -> None:
    """`load_state_dict` of a state that an optimizer of the same kind, settings and parameters wrote.

    What such a state looks like is asked of the optimizer itself, by an update that is taken back.

    Args:
        optimizer: as the stage makes it, its schedule attached, without a state yet.
        idle: parameters that may have no entry, because no gradient reaches them.
    """
    before, after = layouts(optimizer)
    right = set(state) == set(before) and isinstance(state["state"], dict) and isinstance(state["param_groups"], list)
    require(right, source, "its optimizer holds other parts than this run's")
    for name in before.keys() - {"state", "param_groups"}:
        check_value(state[name], before[name], f"its optimizer's {name}", source)
    groups, likes = state["param_groups"], (after if state["state"] else before)["param_groups"]
    require(len(groups) == len(likes), source, f"its optimizer has {len(groups)} groups, this run's {len(likes)}")
    for i, (group, like, first) in enumerate(zip(groups, likes, before["param_groups"], strict=True)):
        right = isinstance(group, dict) and set(group) == set(like)
        require(right, source, f"its optimizer's group {i} has other settings than this run's")
        for name, value in like.items():
            moves = name == "lr" or name not in first or first[name] != value
            check_value(group[name], value, f"its optimizer's {name}", source)
            require(moves or group[name] == value, source, f"its optimizer's {name} is not this run's")
    check_entries(state["state"], after["state"], indices(optimizer, idle), source)
    optimizer.load_state_dict(state)


def check_entries(entries: dict, likes: dict[int, dict], idle: set[int], source: str) -> None:
    """Each parameter's state, against what one update leaves; none at all is an optimizer that has not begun."""
    known = all(type(index) is int and index in likes for index in entries)
    complete = not entries or likes.keys() - entries.keys() <= idle
    require(known and complete, source, "its optimizer's state is of other parameters than this run trains")
    for index, entry in entries.items():
        right = isinstance(entry, dict) and set(entry) == set(likes[index])
        require(right, source, f"its optimizer's state of parameter {index} holds other parts than this run's")
        for name, like in likes[index].items():
            check_value(entry[name], like, f"its optimizer's {name} of parameter {index}", source)
            right = name != "step" or entry[name] >= 0
            require(right, source, f"its optimizer's step of parameter {index} is negative")


def check_value(value: Any, like: Any, name: str, source: str) -> None:
    """Raises FarError unless `value` is nested like `like`: tensors of its shape and type, all numbers finite."""
    if isinstance(like, Tensor):
        try:
            check_dense(value, (like.dtype,), name, source)
            check_tensor(value, like, name, source)
        except FarError as error:
            raise FarError(f"{str(error).rpartition(';')[0]}; {MEND}") from error
        return
    require(type(value) is type(like), source, f"{name} is a {type(value).__name__}, not a {type(like).__name__}")
    if isinstance(like, list | tuple):
        require(len(value) == len(like), source, f"{name} has {len(value)} parts, this run's {len(like)}")
        for part, like_part in zip(value, like, strict=True):
            check_value(part, like_part, name, source)
    elif type(like) in (int, float):
        low = min(0, like)  # a rate or a count, unless the run's own is below 0
        right = is_int(value, low, 2**53) if type(like) is int else real(value, low, max(like, LARGEST))
        require(right, source, f"{name} is negative or not finite")


def indices(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> set[int]:
    """The numbers under which an optimizer's state_dict knows these parameters."""
    wanted, known = set(map(id, parameters)), (p for group in optimizer.param_groups for p in group["params"])
    return {i for i, p in enumerate(known) if id(p) in wanted}


@torch.no_grad()
def layouts(optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """state_dict as it is, and as one update leaves it; the update is taken back."""
    before = copy.deepcopy(optimizer.state_dict())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = optimizer.state_dict()
    optimizer.load_state_dict(before)
    optimizer.zero_grad(set_to_none=True)
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
    return before, after
