"""Building the CPU kernel: builds that collide, fall back, are damaged, or have nowhere to go."""

import os
import platform
from pathlib import Path

import pytest
import torch

from models.kernels import cpu
from tests.test_kernels import start

STEPS = len(list(cpu.SOURCES.glob("*.cpp"))) + 1  # compiler calls of a build: each source, then all together
AVAILABLE = """
import torch
from models.kernels import cpu
print(cpu.available(), flush=True)
"""


def test_two_processes_building_at_once_do_not_collide(tmp_path):
    both = [start(AVAILABLE, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")) for _ in range(2)]
    for process in both:
        said, error = process.communicate(timeout=300)
        assert said.strip() == str(cpu.available()), error
    assert len(list((tmp_path / "cache").iterdir())) <= 1  # one build, nothing left over


def test_a_home_that_cannot_be_written_does_not_break_it(tmp_path):
    (tmp_path / "file").write_text("")  # a file in the folder's place fails for root too
    process = start(AVAILABLE, TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "cache"), TMPDIR=str(tmp_path))
    said, error = process.communicate(timeout=300)
    assert said.strip() == str(cpu.available()), error


def test_without_a_compiler_torch_serves_and_one_line_says_so(tmp_path):
    process = start(
        AVAILABLE,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        TMPDIR=str(tmp_path),
        CXX="no-such-compiler",
        PATH=os.environ["PATH"],
    )
    said, error = process.communicate(timeout=300)
    assert said.strip() == "False" and error.count("could not be built") == 1, error


def compiler(folder, script):
    """A stand-in for CXX."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_more_than_a_compiler_is_needed_and_openmp_may_be_missing(tmp_path):
    refuses = compiler(
        tmp_path, 'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac; exec c++ "$@"'
    )
    process = start(AVAILABLE, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"), CXX=refuses, PATH="/usr/bin:/bin")
    said, error = process.communicate(timeout=300)
    assert said.strip() == str(cpu.available()) and not error, error


def test_the_warning_names_what_the_compiler_minded(tmp_path):
    fails = compiler(
        tmp_path, 'echo "In file included from a.h:1" >&2; echo "a.h:9:10: fatal error: b.h: No such file" >&2; exit 1'
    )
    said, error = start(AVAILABLE, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"), CXX=fails).communicate(timeout=300)
    assert (
        said.strip() == "False" and "a.h:9:10: fatal error: b.h: No such file" in error and len(error.splitlines()) == 1
    ), error


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Builds with a compiler that has these macros and writes `made`; gives the library and how often it was called."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def build(macros: str) -> tuple[Path, int]:
        made = []

        def call(command, text=""):
            if "-dM" not in command:
                made.append(Path(command[-1]).write_text("made"))
            return macros

        monkeypatch.setattr(cpu, "_call", call)
        return cpu._build(cpu.TUNED, True, "far"), len(made)

    return build


def test_a_cpu_with_other_instructions_gets_its_own_build(pretend):
    (one, _), (other, calls) = (
        pretend("#define __AVX512F__ 1"),
        pretend("#define __AVX512F__ 1\n#define __AVX512BF16__ 1"),
    )
    assert one != other and calls == STEPS
    assert pretend("#define __AVX512F__ 1") == (one, 0)


@pytest.mark.parametrize(
    "damage", [lambda p: p.write_text("ma"), lambda p: p.unlink(), lambda p: p.with_name("sha256").write_text("")]
)
def test_a_damaged_build_is_made_again(pretend, damage):
    library, _ = pretend("")
    damage(library)
    assert (
        pretend("") == (library, STEPS)
        and library.read_text() == "made"
        and len(list(library.parent.parent.iterdir())) == 1
    )


def test_a_library_for_more_than_this_cpu_has_registers_nothing():
    flags = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not flags.is_file() or " fma4 " in flags.read_text() or not cpu.available():
        pytest.skip("no CPU here that is known to lack fma4")
    torch.ops.load_library(cpu._build(("-mfma4",), True, "far_for_another_cpu"))
    assert not hasattr(torch.ops.far_for_another_cpu, "forward")


def test_neither_a_user_number_nor_a_home_is_needed(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delattr(os, "getuid", raising=False)
    monkeypatch.setenv("USER", "somebody")
    assert cpu.cache_folders()[1].name == "torch_extensions_somebody"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert [folder.name for folder in cpu.cache_folders()] == ["torch_extensions_somebody"]
