"""The house's rules that a tool can hold."""

import ast

from tests.conftest import ROOT

FOLDERS = "models engine deploy plots datasets utils docs".split()
SOURCES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
REPLACING = {"Replacement", "MultiHeadBiRNN", "MultiHeadBiLSTM", "MultiHeadBiGRU", "MultiHeadBiMinGRU", "SingleLSTM"}
REPLACING |= {"TokenMixer", "Mlp"}


METHOD = ("train", "resume", "stages", "distill", "evaluate", "fidelity", "hoyer", "shrink", "activations")
# Nothing imports a folder above its own, but recipes: pruning asks deploy for times, modes draw and evaluate fused.
ABOVE = {
    "utils": {"datasets", "models", "engine", "deploy", "plots"},
    "datasets": {"models", "engine", "deploy", "plots"},
    "models": {"datasets", "engine", "deploy", "plots"},
    "deploy": {"engine", "plots"},
    "plots": {"engine", "deploy"},
}


def imported(path) -> set[str]:
    """The suite's folders that a file imports, inside its functions too."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_imports_run_downwards():
    for folder, above in ABOVE.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert not imported(path) & above, path.name
    for name in METHOD:
        assert not imported(ROOT / "engine" / f"{name}.py") & {"deploy", "plots"}, name


def test_what_replaces_attention_is_asked_and_its_class_looked_at_once():
    looks = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type"):
                named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                looks += [path.name] * bool(named & REPLACING)
    assert looks == ["replace.py"]  # replacements(): which blocks are replaced at all
