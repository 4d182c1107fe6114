"""The demo goes through every mode, and goes on where it stopped."""

import re
import shutil
import time
from dataclasses import replace
from functools import partial

import benchmark
import demo
import visualization
from deploy import rivals, timing
from deploy.timing import ROUNDS
from engine.evaluate import evaluate
from models.replace import load_model
from plots import pictures
from tests.conftest import FLOAT32, digits, report
from utils.distributed import Context
from utils.recipe import Recipe


def test_the_demo_writes_its_summary_page_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "one_image", partial(demo.one_image, seconds=0.05))
    monkeypatch.setattr(demo, "visualize", lambda config: pictures.visualize(replace(config, count=1)))
    monkeypatch.setattr(pictures, "EXACT_UP_TO", 0)  # influence is sampled
    assert demo.demo(["--epochs", "1", "--train-subset", "0.07"]) == 0
    said, run = capsys.readouterr().out, tmp_path / "runs/demo"
    summary = report(run, "summary.json")
    agreements = [row["agreement"] for row in summary["rows"].values()]
    assert agreements[0] is agreements[4] is None and all(0 <= value <= 100 for value in agreements[1:4])
    assert [len(report["output_error"]) for report in summary["fidelity"].values()] == [4] * 4
    assert [line.split("  ")[0] for line in said.splitlines()[-7:-2]] == list(summary["rows"])
    assert "agrees %" in said and "ms, our engine" in said and "ms, ONNX Runtime" in said
    page = tmp_path / said.split()[-1]
    links = set(re.findall(r'href="([^"]+)"', page.read_text()))
    assert {"fidelity.png", "attn/curves.png", "prune/units.png", "figures/influence.png"} <= links
    assert all((page.parent / link).stat().st_size > 5000 for link in links)
    assert len(list((run / "figures").glob("*.png"))) == 3  # an image's maps, two of tokens
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: None)
    assert visualization.main(["--count", "1", "--block", "0"]) == 0  # finds the demo by itself
    assert "runs/demo/figures" in capsys.readouterr().out


def test_a_recipe_leaves_finished_commands_alone_and_refuses_other_flags(tmp_path, failure):
    def teach(seed, argv=(*demo.TEACHER, *demo.DIGITS)):
        recipe = Recipe(tmp_path, [*demo.COMMON, "--seed", str(seed)], epochs=1)
        return recipe.run("main.py", "teacher", *argv), recipe.seconds

    first = teach(0)
    written = (tmp_path / "teacher/best.pth").stat().st_mtime_ns
    assert teach(0) == first and (tmp_path / "teacher/best.pth").stat().st_mtime_ns == written
    assert "--seed 0, not 1" in failure(script=lambda _: teach(1))


def test_epochs_are_cut_but_for_stages_left_out(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("utils.recipe.import_module", lambda name: type("Script", (), {"main": calls.append}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text("{}")
    Recipe(tmp_path, ["--epochs", "9"], epochs=2).run("main.py", "a", "--block-ft-epochs", "0", "--lr", "1")
    assert calls == [
        "--epochs 2 --block-ft-epochs 0 --lr 1 --output-dir".split() + [str(tmp_path / "a"), "--resume", "auto"]
    ]


def timed_once(call, seconds: float) -> list[float]:
    start = time.perf_counter()
    call()
    return [1e3 * (time.perf_counter() - start)]


def test_benchmark_compares_and_writes(tmp_path, monkeypatch, teacher, far):
    for name, weights in (("teacher", teacher), ("far", far / "best.pth"), ("sweep/keep-0.5", far / "best.pth")):
        (tmp_path / "run" / name).mkdir(parents=True)
        shutil.copy(weights, tmp_path / "run" / name / "best.pth")
    monkeypatch.chdir(tmp_path)
    few = {name: rivals.VARIANTS[name] for name in (rivals.BASE, "FAR", "FAR 0.25")}
    monkeypatch.setattr(rivals, "VARIANTS", few)
    monkeypatch.setattr(timing, "measure", timed_once)  # of layers; whole models have processes of their own
    flags = "--quick --seconds 0.01 --batches 1 --image-size 32 224 --runs run --runtimes".split()
    assert benchmark.benchmark([*flags, "timm eager"]) == 0
    out = report(tmp_path / "runs/benchmark", "benchmark.json")
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
    model, _ = load_model(far / "best.pth")
    alone = evaluate(model, digits().val_loader(60), Context(), FLOAT32)
    assert abs(rows["FAR fused"]["acc1"] - alone["acc1"]) < 2  # barely trained: ties tip over when maps are merged
    size = out["size"]
    assert size["DeiT-Tiny"]["parameters"] == 5_717_416 and size["FAR 0.25"]["macs"] < size["FAR"]["macs"]
