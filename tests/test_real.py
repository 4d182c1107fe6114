"""real.py in a small setting: its rows, its table and page, several processes, and going on."""

import json
import re
import shutil

import pytest

import real
from deploy.speed import ENGINE
from tests.conftest import ROOT, launch
from tests.test_datasets import solar_cells
from utils.errors import FarError

SMALL = ["--input-size", "28", "--epochs", "1"]


@pytest.fixture
def packaged(tmp_path, teacher, monkeypatch):
    """A made elpv_dataset to be imported, and a small model where real.py keeps the converted one."""
    package = tmp_path / "packages/elpv_dataset"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    solar_cells(package / "data", count=8)
    (tmp_path / "runs/real").mkdir(parents=True)
    shutil.copy(teacher, tmp_path / "runs/real/dinov2.pth")
    return {"PYTHONPATH": f"{ROOT}:{package.parent}", "CUDA_VISIBLE_DEVICES": ""}


def test_every_row_is_trained_measured_and_drawn_and_a_second_call_goes_on(tmp_path, packaged):
    first = launch(str(ROOT / "real.py"), *SMALL, cwd=tmp_path, timeout=900, **packaged)
    assert first.returncode == 0, first.stderr
    short = json.loads((tmp_path / "runs/real/28px/rows.json").read_text())["0"]
    assert list(short) == ["teacher", *real.SHORT]
    done = launch(str(ROOT / "real.py"), *SMALL, "--all", cwd=tmp_path, timeout=900, **packaged)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "runs/real/28px/rows.json").read_text())["0"]
    assert set(found) == {"teacher", *real.SWAPPED, *real.PRUNED}
    assert "training" not in done.stdout.partition("== far-labels")[0]  # what the first call finished
    for row in short:
        same = ("acc1", "balanced_acc1", "agreement", "parameters", "minutes")
        assert {k: found[row][k] for k in same} == {k: short[row][k] for k in same}
    assert found["teacher"]["agreement"] == 100 and found["teacher"]["kl"] == 0
    sizes = [found[row]["parameters"] for row in ("FAR", "kept 0.5", "kept 0.25", real.SMALLEST)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert all(row[ENGINE] > 0 and 0 < row["balanced_acc1"] <= 100 and row["macs"] > 0 for row in found.values())
    table = done.stdout[done.stdout.index("balanced %") :]
    assert all(f"\n{row}  " in table for row in found)
    page = tmp_path / done.stdout.split()[-1]
    links = set(re.findall(r'href="([^"]+)"', page.read_text()))
    assert links and all((page.parent / link).is_file() for link in links)


def test_the_table_is_the_mean_over_the_seeds():
    rows = [{"FAR": {"acc1": acc1, "kl": 0.5, "m_macs": 7.0}} for acc1 in (80.0, 81.0)]
    heads, far = real.table(rows)
    assert dict(zip(heads, far, strict=True))["top-1 %"] == "80.50"
    assert dict(zip(heads, far, strict=True))["least z"] == "-"  # not measured


def test_a_command_runs_in_several_processes_and_its_failure_ends_all(tmp_path, capfd):
    plan = ["--mode", "teacher", "--dataset", "DIGITS", "--scale", "Micro", "--dry-run", "--batch-size", "64"]
    real.by_torchrun(2, "main.py", plan)
    assert "epochs of 11 updates" in capfd.readouterr().out  # 1,437 images over two processes
    with pytest.raises(FarError):
        real.by_torchrun(2, "main.py", ["--mode", "teacher", "--epochs", "-1"])
    assert "--epochs" in capfd.readouterr().err


def test_without_the_packages_it_is_one_line(tmp_path, failure, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = failure("--output-dir", tmp_path / "run", script=real.main)
    assert "pip install --no-deps -r requirements-real.txt" in said


def test_what_cannot_be_is_said_before_anything_is_made(tmp_path, failure):
    assert "multiple of its patch size, 14" in failure("--input-size", "100", script=real.main)
    (tmp_path / "file").touch()
    assert "--output-dir" in failure("--output-dir", tmp_path / "file/run", script=real.main)
