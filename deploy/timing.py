"""How times and memory are taken."""

import os
import statistics
import time
from collections.abc import Callable

PAUSE_S = 0.2  # between programs: threads of one that still spin would spoil the other's times
Times = dict[str, dict[str, float]]


def summary(times: list[float]) -> dict:
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartiles_ms": [low, high], "repeats": len(times)}


def interleaved(calls: dict[str, Callable], seconds: float, least: int = 5) -> Times:
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
    return {name: summary(found) for name, found in times.items()}


def peak_bytes(call: Callable) -> int:
    """Peak bytes allocated during a call, beyond what was there before it: the running sum of torch's allocations."""
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
