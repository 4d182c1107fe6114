"""Building the CPU kernel, with compilers that are not there or pretend: nothing is compiled here."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.kernels import cpu

STEPS = len(list(cpu.SOURCES.glob("*.cpp"))) + 1  # compiler calls of a build: each source, then all together
load = cpu.load.__wrapped__  # not what an earlier test loaded


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Builds by a compiler that has these macros and writes `made`; gives the library and how often it was called."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def run(macros: str = "") -> tuple[Path, int]:
        made = []

        def call(command, text=""):
            if "-dM" not in command:
                made.append(Path(command[-1]).write_text("made"))
            return macros

        monkeypatch.setattr(cpu, "_call", call)
        return cpu._build(cpu.TUNED, True, "far"), len(made)

    return run


def test_concurrent_builds_do_not_collide(build, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        libraries = {library for library, _ in pool.map(lambda _: build(), range(4))}
    (folder,) = tmp_path.iterdir()  # one build, nothing left over
    assert libraries == {folder / "lstm.so"}


def test_where_the_cache_cannot_be_written_another_folder_serves(build, monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # a file in the folder's place fails for root too
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library, _ = build()
    assert library.is_file() and library.is_relative_to(tmp_path / f"torch_extensions_{os.getuid()}")


def test_a_cpu_with_other_instructions_gets_its_own_build(build):
    one, _ = build("#define __AVX512F__ 1")
    other, calls = build("#define __AVX512F__ 1\n#define __AVX512BF16__ 1")
    assert one != other and calls == STEPS
    assert build("#define __AVX512F__ 1") == (one, 0)


def test_without_a_working_compiler_torch_serves_and_one_line_says_why(monkeypatch, tmp_path, caplog):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text(
        '#!/bin/sh\necho "In file included from a.h:1" >&2; echo "a.h:9: fatal error: no b.h" >&2; exit 1'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert load(cpu.TUNED) is None
    (line,) = caplog.messages
    assert "could not be built, torch's own operators serve instead" in line and "a.h:9: fatal error: no b.h" in line


def test_openmp_and_a_tuned_build_may_be_missing(monkeypatch):
    """A compiler that knows neither flag is called without them."""
    tried = []

    def build(flags, openmp, namespace):
        tried.append((flags, openmp))
        if flags or openmp:
            raise OSError("unknown option")

    operators = SimpleNamespace(forward=None, vector_width=lambda: 4)
    monkeypatch.setattr(cpu, "_build", build)
    monkeypatch.setattr(cpu, "_register", lambda *_: None)
    monkeypatch.setattr(cpu.torch, "ops", SimpleNamespace(load_library=lambda path: None, far=operators))
    assert load(cpu.TUNED) is operators
    assert tried == [(cpu.TUNED, True), (cpu.TUNED, False), ((), True), ((), False)]
