"""What a process keeps to: draws follow from their key, idle threads sleep, freed memory is kept."""

import platform
import random
import sys

import numpy as np
import pytest
import torch

from tests.conftest import Started, launch
from utils.seeding import seed_all, seeded


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_draws_follow_from_the_key_and_leave_the_outside_alone():
    seed_all(1, 2)
    first = draws()
    with seeded(7):
        inside = draws()
    second = draws()
    seed_all(1, 2)
    assert draws() == first
    with seeded(8):
        other = draws()
        with seeded(7):
            assert draws() == inside != other
        deeper = draws()
    with seeded(8):
        assert [draws(), draws()] == [other, deeper]  # a block inside another leaves that alone too
    assert draws() == second


def test_seeded_draws_what_the_key_alone_says():
    with seeded(7, 3):
        found = random.random(), np.random.normal(size=3).tolist(), torch.rand(1).item()
    seed_all(7, 3)
    assert found == (random.random(), np.random.normal(size=3).tolist(), torch.rand(1).item())


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
def test_idle_threads_sleep_soon_so_that_two_trainings_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # this process has set it by itself
    done = launch("-c", "import main, torch", cwd=tmp_path, OMP_DISPLAY_ENV="VERBOSE")
    assert "GOMP_SPINCOUNT = '5000'" in done.stderr  # as libgomp read it
    program = "import os, main; print(os.environ['GOMP_SPINCOUNT'])"
    assert launch("-c", program, cwd=tmp_path, GOMP_SPINCOUNT="7").stdout == "7\n"


FAULTS = """
import resource, sys, torch
from utils.distributed import prepare
if sys.argv[1] == "kept":
    prepare(torch.device("cpu"))
def step():
    return [torch.zeros(12 << 20) for _ in range(2)]  # 48 MiB each
for _ in range(5):
    step()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(5 * min(faults() for _ in range(5)))  # a system short of memory may take pages back in any one step
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_a_training_on_a_cpu_keeps_the_memory_it_frees(tmp_path):
    given_back, kept = (int(Started("-c", FAULTS, way, cwd=tmp_path).finish().stdout) for way in ("given back", "kept"))
    assert given_back > 50_000 and kept < given_back / 10
