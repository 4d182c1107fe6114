"""The demo goes through every mode, keeps its promises about files, and can be run twice."""

import json
import re
import shutil

import demo
from deploy.timing import ROUNDS
from tests.conftest import ROOT, launch


def test_demo_runs_twice_and_writes_its_summary(tmp_path):
    command = [str(ROOT / "demo.py"), "--epochs", "1", "--train-subset", "0.05"]
    for _ in range(2):
        done = launch(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
        assert {
            "teacher_acc1",
            "far_acc1",
            "downstream_acc1",
            "seed",
            "seconds",
            "far_params",
            "pruned_acc1",
            "pruned_params",
            "kept_units",
            "far_agreement",
            "pruned_agreement",
        } <= summary.keys()
        assert [len(r["output_error"]) for r in summary["fidelity"].values()] == [4] * 4
        assert set(summary["seconds"]) == {"teacher", "attn", "far", "downstream", "prune"}
    (tmp_path / "runs/demo/summary.json").rename(tmp_path / "kept.json")  # as if stopped before its end
    done = launch(*command, "--seeds", "1", cwd=tmp_path)
    assert done.returncode == 2 and "--seed 0, not 1" in done.stderr  # no stage of another seed is taken for this one's
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    clocks = ("seconds", "total_seconds", "milliseconds")
    assert {k: v for k, v in again.items() if k not in clocks} == {k: v for k, v in summary.items() if k not in clocks}
    assert (tmp_path / "runs/demo/fidelity.png").stat().st_size > 5000
    assert "FAR after stage block" in done.stdout and "agrees %" in done.stdout and "ms, ONNX Runtime" in done.stdout
    assert all(0 < ms < 1e4 for times in summary["milliseconds"].values() for ms in times.values())
    page = tmp_path / done.stdout.split()[-1]
    links = set(re.findall(r'href="([^"]+)"', page.read_text()))
    assert {"fidelity.png", "attn/curves.png", "prune/units.png", "figures/influence.png"} <= links
    assert all((page.parent / link).is_file() for link in links) and "ms, our engine" in page.read_text()
    assert len(list((tmp_path / "runs/demo/figures").glob("*.png"))) == 6  # two images, maps and blocks; two more
    done = launch(
        str(ROOT / "visualization.py"), "--count", "1", "--block", "0", cwd=tmp_path
    )  # finds the demo by itself
    assert done.returncode == 0 and "runs/demo/figures" in done.stdout, done.stderr


def test_the_demo_removes_only_what_it_made(tmp_path, failure):
    theirs = tmp_path / "theirs"
    (theirs / "teacher").mkdir(parents=True)
    (theirs / "summary.json").write_text("mine")
    (theirs / "teacher/thesis.txt").write_text("mine")
    assert "holds files that no demo made" in failure("--output-dir", theirs, script=demo.demo)
    assert (theirs / "summary.json").read_text() == (theirs / "teacher/thesis.txt").read_text() == "mine"
    own = tmp_path / "own"
    demo.claim(own)
    for name in (
        "teacher/best.pth",
        "data/parity/train/odd/1.png",
        "data/mine.txt",
        "notes.txt",
        "summary.json",
        "attn.seconds",
    ):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text("")
    demo.claim(own)  # finished: it starts afresh
    assert sorted(p.name for p in own.rglob("*") if p.is_file()) == [".far-demo", "mine.txt", "notes.txt"]


def test_benchmark_compares_and_writes(tmp_path, teacher, far):
    for name, weights in (("teacher", teacher), ("far", far / "best.pth"), ("sweep/keep-0.5", far / "best.pth")):
        (tmp_path / "run" / name).mkdir(parents=True)
        shutil.copy(weights, tmp_path / "run" / name / "best.pth")
    command = [
        str(ROOT / "benchmark.py"),
        *"--seconds 0.01 --batches 1 --image-size 32 224 --runs run --runtimes".split(),
        "timm eager",
    ]
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "runs/benchmark/benchmark.json").read_text())
    layer = out["layer, batch 1, threads 1"]
    assert {"attention", "dense BiLSTM", "FAR fused", "FAR pruned 0.25"} <= layer.keys() and layer["attention"][
        "repeats"
    ] >= 3
    assert [p["tokens"] for p in out["tokens"]["FAR fused"]] == [5, 197]
    assert out["models"]["batch 1, 224 px"]["DeiT-Tiny / timm eager float32"]["repeats"] >= ROUNDS
    assert out["models"]["batch 1, 32 px"] == {}  # other sizes are for the fastest runtime and ours
    assert all(p["peak_bytes"] > 0 for points in out["tokens"].values() for p in points)
    for figure in ("tokens.png", "accuracy.png"):
        assert (tmp_path / "runs/benchmark" / figure).stat().st_size > 5000
    rows = {row["name"]: row for row in out["accuracy"]}
    assert {"DeiT-Micro (attention)", "FAR fused", "FAR fused, keep 0.5"} <= rows.keys()
    recorded = json.loads((far / "result.json").read_text())
    assert abs(rows["FAR fused"]["acc1"] - recorded["acc1"]) < 2  # barely trained: ties tip over when maps are merged
    assert (
        out["size"]["DeiT-Tiny"]["parameters"] == 5_717_416
        and out["size"]["FAR 0.25"]["macs"] < out["size"]["FAR"]["macs"]
    )
    assert "USDT" not in done.stdout + done.stderr
