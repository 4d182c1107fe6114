"""Every command in README.md and docs/ parses; the README's own story runs, and its Python too."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, image_folder
from utils.arguments import Parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {"benchmark": "benchmark", "demo": "demo"}  # where it is not `main`
PLACEHOLDERS = {"FILE": "file.pth", "PATH": "file", "PICTURES": "file"}
# What the README's story takes here: a model of 32 pixels, and a share of units in place of a time that other tests
# running beside it would change.
SMALLER = {"DeiT-Tiny": "DeiT-Micro", "--target-latency 85%": "--keep-ratio 0.5", "val/cat": "val/class1"}
FEW = {
    "teacher": "--epochs 1 --batch-size 8 --num-workers 0 --warmup-epochs 0",
    "train": "--epochs 1 --batch-size 8 --num-workers 0 --warmup-epochs 0 --block-ft-epochs 1",
    "prune": "--epochs 1 --batch-size 8 --num-workers 0 --warmup-epochs 0 --ft-epochs 1",
}


def commands(page: Path) -> list[str]:
    """Lines that call Python or torchrun, in indented and fenced blocks, continued lines joined."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    return [s for line in lines if re.match(r"(torchrun|python3|\S*/python) ", s := line.strip()) and ".py" in s]


def split(command: str) -> tuple[str, list[str]]:
    """The script's name and its arguments."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Path(words[place]).stem, words[place + 1 :]


class Parsed(Exception):
    """The flags were read; the rest of the script is not of interest."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses_and_every_link_leads_somewhere(page, tmp_path, monkeypatch):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
    for name in ("deit_tiny.pth", "weights.pth", "far.pth", "file.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    parse_args = Parser.parse_args

    def stop(parser, argv):
        parse_args(parser, argv)
        raise Parsed

    for command in commands(page):
        name, argv = split(command)
        script = importlib.import_module(name)
        if name == "main":
            script.parse(argv)  # knows besides which flags a mode reads
            continue
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(Parser, "parse_args", stop)
            getattr(script, ENTRIES.get(name, "main"))(argv)


@pytest.mark.parametrize(("name", "size"), [("swap", (1700, 1464)), ("real", (1702, 254))])
def test_a_drawing_of_the_docs_is_made_in_the_size_shown(name, size, tmp_path, monkeypatch):
    models = {"teacher": 0.0, "FAR": 0.5, "pruned FAR": 1.0}  # what visualization.py leaves for docs/draw_real.py
    alike = {f"{model} block {i}": np.full((65, 65), value) for model, value in models.items() for i in range(12)}
    np.savez(tmp_path / "similarity-of-tokens.npz", **alike)
    target = str(tmp_path / "drawn.png")
    monkeypatch.setattr(sys, "argv", ["draw", *([str(tmp_path)] if name == "real" else []), target])
    runpy.run_path(str(ROOT / f"docs/draw_{name}.py"), run_name="__main__")
    for path in (target, ROOT / f"docs/{name}.png"):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", size)


def test_the_readmes_story_of_ones_own_images_runs(teacher, tmp_path, monkeypatch, capsys):
    """Its five commands in their order, at DeiT-Micro's size and one epoch."""
    image_folder(tmp_path / "photos", count=8)
    monkeypatch.chdir(tmp_path)
    story = (ROOT / "README.md").read_text().partition("## My DeiT, my images")[2].partition("\n## ")[0]
    block = re.search(r"(?:^ {4}python3 .*\n)+", story, re.MULTILINE)[0].strip().splitlines()
    assert len(block) == 5
    for line in block:
        for told, here in {**SMALLER, "deit_tiny.pth": str(teacher)}.items():
            line = line.replace(told, here)
        name, argv = split(line)
        mode = argv[argv.index("--mode") + 1] if "--mode" in argv else name
        assert importlib.import_module(name).main([*argv, *FEW.get(mode, "").split()]) == 0, line
    told = capsys.readouterr().out.splitlines()[-3:]
    assert any("class1" in line for line in told) and any("class0" in line for line in told)
    assert (tmp_path / "runs/pruned/best.onnx").stat().st_size > 1e5


def test_the_readmes_python_runs(far, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope = {"images": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        exec(code.replace("runs/demo/prune/best.pth", str(far / "best.pth")), scope)
        expected = scope["model"](scope["images"])
    assert (scope["logits"] - expected).abs().max() < 1e-4 * expected.abs().max()
