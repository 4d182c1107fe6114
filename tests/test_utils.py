"""Checkpoints are written whole or not at all; draws follow from their key."""

import platform
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.deit import create_teacher
from models.weights import load_teacher_weights, read
from tests.conftest import ROOT, launch
from utils import checkpoint, memory
from utils.errors import FarError
from utils.seeding import seed_all, seeded


def test_a_failing_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, {"x": torch.ones(2)})

    def broken(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        checkpoint.write_atomic(path, broken)
    assert torch.equal(checkpoint.load(path, "--t")["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("size", [0, 10, 2000])
def test_damaged_files_are_one_clear_error(tmp_path, size):
    checkpoint.save(tmp_path / "a.pth", {"x": torch.ones(4000)})
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:size])
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.pth").read_bytes()[:size])
    for name in ("b.pth", "b.safetensors"):
        with pytest.raises(FarError, match=f"--t .*{name}"):
            checkpoint.load(tmp_path / name, "--t")


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


def test_position_embeddings_are_resized_when_teacher_weights_are_loaded(tmp_path):
    small = create_teacher("DeiT-Micro", 10, 32)
    torch.save(small.state_dict(), tmp_path / "a.pth")
    large = create_teacher("DeiT-Micro", 10, 48)
    load_teacher_weights(large, read(tmp_path / "a.pth"))
    assert large.pos_embed.shape[1] == 145
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])
    assert torch.equal(large.blocks[2].attn.qkv.weight, small.blocks[2].attn.qkv.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(("script", "spins"), [("main.py", "5000"), ("prune.py", "5000"), ("demo.py", "10000")])
def test_idle_threads_sleep_soon_so_that_two_trainings_share_the_cores(script, spins, tmp_path, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # this process has set it by itself
    done = launch(str(ROOT / script), "--scale", "Micro", cwd=tmp_path, OMP_DISPLAY_ENV="VERBOSE")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr  # as libgomp read it
    done = launch(str(ROOT / script), "--scale", "Micro", cwd=tmp_path, OMP_DISPLAY_ENV="VERBOSE", GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '7'" in done.stderr


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
    given_back, kept = (int(launch("-c", FAULTS, way, cwd=tmp_path).stdout) for way in ("given back", "kept"))
    assert given_back > 50_000 and kept < given_back / 10


@pytest.mark.parametrize("most", [1 << 40, 32 << 20])  # an older glibc takes no higher one
def test_an_allocator_that_refuses_the_threshold_gets_the_highest_it_takes(most, monkeypatch):
    took = {}

    def mallopt(parameter, value):
        if parameter == memory.M_MMAP_THRESHOLD and value > most:
            return 0
        took[parameter] = value
        return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed()
    assert took == {memory.M_MMAP_THRESHOLD: min(most, memory.LARGE), memory.M_TRIM_THRESHOLD: memory.LARGE}
