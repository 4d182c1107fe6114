"""How time and memory are measured: repeated calls of one thing, and several things in turns."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.benchmark import Timer

PAUSE_S = 0.2  # between programs: threads of one that still spin would slow the next
ROUNDS = 3
CPU = torch.device("cpu")
Call = Callable[[], object]
Times = dict[str, dict[str, float]]


def measure(call: Call, seconds: float) -> list[float]:
    """Milliseconds of repeated calls, after a warm-up, on torch's number of threads; on CUDA each is waited for."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return [1e3 * s for s in timer.blocked_autorange(min_run_time=seconds).times]


def in_turns(
    measures: Mapping[str, Callable[[float], list[float]]], seconds: float, rounds: int = ROUNDS, pause: float = 0.0
) -> Times:
    """Median and quartiles in milliseconds by name. Other work on the machine then slows all of them alike.

    Args:
        measures: by name, a function of seconds to measured milliseconds; one that gives none in a turn is left out.
        seconds: for each name and round.
        rounds: how often each has its turn, two at least.
        pause: seconds of rest before each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, run in measures.items():
            time.sleep(pause)
            times[name] += run(seconds)
    return {name: summary(measured) for name, measured in times.items() if len(measured) >= rounds}


def compare(calls: Mapping[str, Call], seconds: float, rounds: int = ROUNDS) -> Times:
    """`in_turns` of calls in this process, `seconds` for all of them together."""
    each = seconds / len(calls) / rounds if calls else 0.0
    return in_turns({name: lambda s, call=call: measure(call, s) for name, call in calls.items()}, each, rounds)


def lower_quartiles(calls: Mapping[Any, Call], seconds: float) -> dict[Any, float]:
    """Milliseconds by name, in ten turns; lower quartiles, as other work only adds time."""
    return {name: times["quartiles_ms"][0] for name, times in compare(calls, seconds, rounds=10).items()}


def summary(times: list[float]) -> dict[str, float | list[float]]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartiles_ms": [low, high], "repeats": len(times)}


def peak_bytes(call: Call, device: torch.device = CPU) -> int:
    """The most bytes that torch allocates during a call beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's notices stand between the rows
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
