"""Every command in README.md and docs/ parses; the README's own story runs, and its Python too."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.bilstm import MultiHeadBiLSTM
from tests.conftest import ROOT, image_folder, launch
from utils.arguments import Parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A time measured beside other tests says nothing, so a share of the units is asked for instead.
SMALLER = {
    "deit_tiny.pth": "",
    "DeiT-Tiny": "DeiT-Micro",
    "--target-latency 85%": "--keep-ratio 0.5",
    "val/cat": "val/class1",
}
ENTRIES = {"benchmark": "benchmark", "demo": "demo"}  # where it is not `main`
PLACEHOLDERS = {"FILE": "file.pth", "PATH": "file", "PICTURES": "file"}


def commands(page: Path) -> list[str]:
    """Lines that call Python or torchrun, in indented and fenced blocks, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    lines = [
        line.strip() for line in text.splitlines() if re.match(r"(?: {4}|\s*)(torchrun|python3|\S*/python) ", line)
    ]
    return [line for line in lines if ".py" in line]


def arguments(command: str) -> tuple[str, list[str]]:
    """The script's name and what it is given."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Path(words[place]).stem, words[place + 1 :]


class Parsed(Exception):
    """The flags were read; the rest of the script is not of interest."""


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}-{i}" for i, (page, _) in enumerate(ALL)])
def test_every_command_parses(page, command, tmp_path, monkeypatch):
    for name in ("deit_tiny.pth", "weights.pth", "far.pth", "file.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    name, argv = arguments(command)
    script, parse_args = importlib.import_module(name), Parser.parse_args

    def stop(*given):
        parse_args(*given)
        raise Parsed

    if name == "main":
        script.parse(argv)  # knows besides which flags a mode reads
    else:
        monkeypatch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Parsed):
            getattr(script, ENTRIES.get(name, "main"))(argv)


def test_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_drawing_of_the_swap_is_made_in_the_size_shown(tmp_path):
    done = launch(str(ROOT / "docs/draw_swap.py"), str(tmp_path / "swap.png"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "swap.png", ROOT / "docs/swap.png"):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (1700, 1464))
        assert path.stat().st_size < 150_000


def test_the_drawing_of_the_swap_says_what_stage_attn_trains():
    (_, name, _, trained, _), _ = runpy.run_path(str(ROOT / "docs/draw_swap.py"))["STAGES"]
    attn = MultiHeadBiLSTM(8, 2, 3)
    parts = [child for child, module in attn.named_children() if module in attn.mixing_parts()]
    assert name == "stage attn" and [part.replace("LSTMs", "lstm") for part in trained] == parts


def test_the_picture_of_the_real_model_is_drawn_from_what_visualization_leaves(tmp_path):
    models = {"teacher": 0.0, "FAR": 0.5, "pruned FAR": 1.0}
    alike = {f"{name} block {i}": np.full((65, 65), value) for name, value in models.items() for i in range(12)}
    np.savez(tmp_path / "similarity-of-tokens.npz", **alike)
    done = launch(str(ROOT / "docs/draw_real.py"), str(tmp_path), "drawn.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "drawn.png", ROOT / "docs/real.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == (1702, 254)
        assert path.stat().st_size < 100_000


def test_the_readmes_story_of_ones_own_images_runs(teacher, tmp_path, monkeypatch, capsys):
    """Its five commands in their order, at DeiT-Micro's size and one epoch."""
    image_folder(tmp_path / "photos", count=8)
    monkeypatch.chdir(tmp_path)
    story = (ROOT / "README.md").read_text().partition("## My DeiT, my images")[2].partition("\n## ")[0]
    block = re.search(r"(?:^ {4}python3 .*\n)+", story, re.MULTILINE)[0].strip().splitlines()
    assert len(block) == 5
    few = "--epochs 1 --batch-size 8 --num-workers 0 --warmup-epochs 0".split()
    shorter = {"teacher": few, "train": [*few, *"--block-ft-epochs 1 --block-ft-warmup-epochs 0".split()], "prune": few}
    for line in block:
        for told, here in SMALLER.items():
            line = line.replace(told, here or str(teacher))
        name, argv = arguments(line)
        mode = argv[argv.index("--mode") + 1] if "--mode" in argv else name
        more = [*shorter.get(mode, []), *("--ft-epochs 1 --ft-warmup-epochs 0".split() if mode == "prune" else [])]
        assert importlib.import_module(name).main([*argv, *more]) == 0, line
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
