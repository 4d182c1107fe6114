"""The demo goes through every mode, keeps its promises about files, and can be run twice."""

import json

from tests.conftest import ROOT, launch


def test_demo_runs_twice_and_writes_its_summary(tmp_path):
    command = [str(ROOT / "demo.py"), "--epochs", "1", "--train-subset", "0.05"]
    for _ in range(2):
        done = launch(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
        assert {"teacher_acc1", "far_acc1", "downstream_acc1", "seed", "seconds", "far_params", "pruned_acc1", "pruned_params",
                "kept_units"} <= summary.keys()
        assert set(summary["seconds"]) == {"teacher", "attn", "far", "downstream", "prune"}
    assert (tmp_path / "runs/demo/similarity.png").stat().st_size > 5000
    assert "FAR after stage block" in done.stdout
    assert len(list((tmp_path / "runs/demo/figures").glob("*.png"))) == 6
    done = launch(str(ROOT / "visualization.py"), "--count", "1", "--block", "0", cwd=tmp_path)  # finds the demo by itself
    assert done.returncode == 0 and "runs/demo/figures" in done.stdout, done.stderr


def test_benchmark_compares_and_writes(tmp_path):
    command = [str(ROOT / "benchmark.py"), "--seconds", "0.01", "--batches", "1", "--image-size", "32", "224"]
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "runs/benchmark/benchmark.json").read_text())
    layer = out["layer, batch 1, threads 1"]
    assert {"attention", "dense BiLSTM", "FAR fused", "FAR pruned 0.25"} <= layer.keys() and layer["attention"]["repeats"] >= 5
    assert [p["tokens"] for p in out["tokens"]["FAR fused"]] == [5, 197]
    assert all(p["peak_bytes"] > 0 for points in out["tokens"].values() for p in points)
    assert (tmp_path / "runs/benchmark/tokens.png").stat().st_size > 5000
