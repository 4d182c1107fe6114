"""The demo goes through every mode, keeps its promises about files, and can be run twice."""

import json

from tests.conftest import ROOT, launch


def test_demo_runs_twice_and_writes_its_summary(tmp_path):
    command = [str(ROOT / "demo.py"), "--epochs", "1", "--train-subset", "0.05"]
    for _ in range(2):
        done = launch(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
        assert {"teacher_acc1", "far_acc1", "downstream_acc1", "seed", "seconds", "far_params"} <= summary.keys()
        assert set(summary["seconds"]) == {"teacher", "attn", "far", "downstream"}
    assert (tmp_path / "runs/demo/similarity.png").stat().st_size > 5000
    assert "FAR after stage block" in done.stdout
