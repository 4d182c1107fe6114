"""real.py in a small setting: its rows, its table and page, several processes."""

import re
import shutil
from functools import partial
from pathlib import Path

import pytest

import main
import prune
import real
from deploy.latency import in_engine
from deploy.speed import ENGINE, one_image
from tests.conftest import report
from tests.test_datasets import solar_cells
from utils.errors import FarError
from utils.recipe import Recipe


def test_every_row_is_a_command():
    """Each row's flags, as run_seed joins them, are those of main.py or prune.py."""
    for epochs in (real.QUICK, real.PATIENT):
        for flags in real.SWAPPED.values():
            main.parse([*real.COMMON, *real.SWAP, *epochs[0], *flags])
        for of, flags in real.PRUNED.values():
            prune.build_parser().parse_args([*real.COMMON, *real.PRUNE, *epochs[1], *flags, "--model-path", of])
            assert of in real.SWAPPED
    assert {*real.SWAPPED, *real.PRUNED} >= set(real.SHORT)


def test_rows_are_trained_measured_and_drawn(tmp_path, teacher, monkeypatch, capsys):
    """The rows of LSTMs, and of as many blocks as --replace takes; a cell more changes a flag alone."""
    package = tmp_path / "packages/elpv_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    solar_cells(package / "data")
    (tmp_path / "runs/real").mkdir(parents=True)
    shutil.copy(teacher, tmp_path / "runs/real/dinov2.pth")  # a small model where the converted one is kept
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(real, "COMMON", [*real.COMMON, "--num-workers", "0"])
    monkeypatch.setattr(real, "one_image", partial(one_image, seconds=0.05))
    monkeypatch.setattr(real, "in_engine", partial(in_engine, seconds=0.05))
    monkeypatch.setattr(real, "SWAPPED", {"FAR": real.PRESERVE, real.HYBRID: [*real.PRESERVE, "--replace", "auto:3"]})
    monkeypatch.setattr(real, "PRUNED", {row: real.PRUNED[row] for row in ("kept 0.25", real.SMALLEST)})
    monkeypatch.setattr(real, "visualize", lambda config: drawn.append(config) or (Path(), []))  # has tests of its own
    assert real.main(["--input-size", "28", "--epochs", "1", "--all"]) == 0
    assert all(path.is_file() for path in (drawn[0].base_weight, drawn[0].far_weight, drawn[0].pruned_weight))
    said = capsys.readouterr().out
    rows = report(tmp_path / "runs/real/28px", "rows.json")["0"]
    assert set(rows) == {"teacher", *real.SWAPPED, *real.PRUNED}
    assert rows["teacher"]["agreement"] == 100 and rows["teacher"]["kl"] == 0
    sizes = [rows[row]["parameters"] for row in ("FAR", "kept 0.25", real.SMALLEST)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert all(row[ENGINE] > 0 and 0 < row["balanced_acc1"] <= 100 and row["macs"] > 0 for row in rows.values())
    printed = said[said.index("balanced %") :]
    assert all(f"\n{row}  " in printed for row in rows)
    page = tmp_path / said.split()[-1]
    assert (page.parent / "front.png").is_file() and "ranking.png" in page.read_text()
    points = real.by_count(tmp_path / "runs/real/28px/seed0")
    assert [point[3] for point in points] == ["1", "2", "3", "4"] and all(0 <= point[1] <= 100 for point in points)
    links = set(re.findall(r'href="([^"]+)"', page.read_text()))
    assert links and all((page.parent / link).is_file() for link in links)


def test_the_table_is_the_mean_over_the_seeds():
    rows = [{"FAR": {"acc1": acc1, "kl": 0.5, "m_macs": 7.0}} for acc1 in (80.0, 81.0)]
    heads, far = real.table_rows(rows)
    assert dict(zip(heads, far, strict=True))["top-1 %"] == "80.50"
    assert dict(zip(heads, far, strict=True))["least z"] == "-"  # not measured


def test_a_command_runs_in_several_processes_and_its_failure_ends_all(tmp_path, capfd):
    recipe = Recipe(tmp_path, ["--dataset", "DIGITS", "--scale", "Micro"], processes=2)
    with pytest.raises(FarError, match=r"main\.py ended with exit code"):
        recipe.run("main.py", "teacher", "--mode", "teacher", "--epochs", "-1")
    assert "--epochs" in capfd.readouterr().err
