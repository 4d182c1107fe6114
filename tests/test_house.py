"""The house's rules that a tool can hold."""

import ast

from tests.conftest import ROOT

PARTS = (
    "main.py",
    "convert.py",
    "hubconf.py",
    "prune.py",
    "visualization.py",
    "export.py",
    "demo.py",
    "study.py",
    "benchmark.py",
    "models",
    "engine",
    "datasets",
    "utils",
    "docs",
)
SOURCES = [
    path for part in PARTS for path in ((ROOT / part).rglob("*.py") if (ROOT / part).is_dir() else [ROOT / part])
]
REPLACING = {"Replacement", "MultiHeadBiRNN", "MultiHeadBiLSTM", "MultiHeadBiGRU", "SingleLSTM", "TokenMixer", "Mlp"}


def test_no_function_is_longer_than_a_screen():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{path.name}: {node.name}"


def test_what_replaces_attention_is_asked_and_its_class_looked_at_once():
    looks = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type"):
                named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                looks += [path.name] * bool(named & REPLACING)
    assert looks == ["replace.py"]  # replacements(): which blocks are replaced at all
