"""Units by time: a selection worked out by hand from a table made up here, and prune.py --target-latency for real."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

import prune
from deploy import latency
from engine.hoyer import unit_norms
from engine.pruning import keep_fast
from engine.shrink import shrink
from models.replace import FarConfig, build, load_model, replacements
from tests.test_prune import SMALL, lists, run
from utils import arguments
from utils.arguments import Latency
from utils.errors import FarError

TABLE = latency.LatencyTable(batch=1, threads=2, teacher_ms=20.0, ms={1: 4.0, 2: 6.0, 4: 14.0})
TABLE_32 = latency.LatencyTable(1, 1, 9.0, {1: 3.0, 16: 4.0, 32: 8.0})
# Two blocks of other means: only shares of them count. Sums of s_j / mean(s), best unit first: 2.5 4 5 5.2,
# 1.2 1.9 2.5 2.8 and 1 2 3 4.
NORMS = {
    (0, 0, 0): 3 * torch.tensor([0.2, 1.5, 1.0, 2.5]),
    (0, 0, 1): 3 * torch.tensor([1.2, 0.7, 0.6, 0.3]),
    (1, 0, 0): 7 * torch.tensor([1.0, 1.0, 1.0, 1.0]),
}
PRUNED = {(0, 0, 0): torch.tensor([3.0, 1.0, 2.0]), (0, 0, 1): torch.tensor([2.0])}  # it takes 9 ms
ALL = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("norms", "target", "kept"),
    [
        # A place's share of 14 ms, 6 ms, 4 ms is a third: from 4 units to 2 saves 8 / 3, from 2 to 1 another 2 / 3.
        (NORMS, "14", [ALL, ALL, ALL]),
        (NORMS, "13.9", [ALL, [0, 1], ALL]),  # 0.9 units' worth lost, against 1.2 and 2
        (NORMS, "11.3", [[1, 3], [0, 1], ALL]),
        (NORMS, "8.6", [[1, 3], [0, 1], [0, 1]]),
        (NORMS, "43%", [[1, 3], [0, 1], [0, 1]]),  # of 20 ms
        (NORMS, "5.9", [[1, 3], [0], [0, 1]]),  # 0.7 against 1.5 and 1
        (NORMS, "5.3", [[1, 3], [0], [0]]),
        (NORMS, "20%", [[3], [0], [0]]),
        (PRUNED, "9", [[0, 1, 2], [0]]),  # what was pruned before starts where it is and costs its whole step
        (PRUNED, "8.9", [[0, 2], [0]]),
    ],
)
def test_the_place_that_loses_least_for_its_time_goes_first(norms, target, kept):
    found = keep_fast(norms, TABLE, arguments.latency(target))
    assert list(lists(found).values()) == kept
    assert TABLE.predict(map(len, found.values())) <= TABLE.target_ms(arguments.latency(target))


def test_a_step_that_saves_nothing_is_passed_over():
    table = latency.LatencyTable(1, 1, 9.0, {1: 3.0, 2: 5.0, 4: 5.0})
    assert list(lists(keep_fast(NORMS, table, Latency(4.4, False))).values()) == [ALL, [0], ALL]


def test_a_target_below_one_unit_a_place_is_refused():
    with pytest.raises(FarError, match=r"--target-latency 19%: is 3.80 ms, .* takes 4.00 .*the teacher 20.00"):
        keep_fast(NORMS, TABLE, Latency(19, True))


def test_a_table_is_measured_at_full_vectors_and_read_back_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    config = FarConfig("DeiT-Micro", 10, 32, replaced=(1, 3), units={"1": [[5, 32], [1, 7]]})
    model, state = build(config), torch.get_rng_state()
    table = latency.measure(model, config, 3, 0.25)
    assert torch.equal(state, torch.get_rng_state())
    assert {1, 16, 32} <= table.ms.keys() <= {1, 8, 16, 24, 32}
    assert (table.batch, table.threads) == (3, torch.get_num_threads())
    times = list(table.ms.values())
    assert times == sorted(times) and times[0] > 0 and table.teacher_ms > 0
    file = tmp_path / latency.FILE
    file.write_text(json.dumps({"table": asdict(table)}))
    assert latency.read_table(file, 32) == table
    for ms, most in (({}, 32), (table.ms, 64)):  # nothing in it; of a model with fewer units
        file.write_text(json.dumps({"table": {**asdict(table), "ms": ms}}))
        with pytest.raises(FarError, match="damaged"):
            latency.read_table(file, most)


def test_models_timed_are_the_shapes_that_pruning_leaves(monkeypatch):
    seen = {}
    monkeypatch.setattr(latency, "in_engine", lambda models, *_: seen.update(models) or dict.fromkeys(models, 1.0))
    config = FarConfig("DeiT-Micro", 10, 32, replaced=(1, 3), units={"1": [[5, 32], [1, 7]]}, mlp={"2": 40})
    model = build(config)
    latency.measure(model, config, 1, 0.5)
    assert {i: attn.sizes for i, attn in replacements(seen["16"]).items()} == dict.fromkeys((1, 3), [[16, 16]] * 2)
    assert [block.mlp.fc1.out_features for block in seen["1"].blocks] == [128, 128, 20, 128]
    assert not replacements(seen["teacher"]) and not any(module.training for module in seen.values())
    kept = keep_fast(unit_norms(replacements(model)), TABLE_32, Latency(5.0, False))
    small = copy.deepcopy(model)
    shrink(replacements(small), kept)
    found = latency.check_target(small, config, TABLE_32, Latency(5.0, False))
    assert seen["model"] is not small and replacements(seen["model"])[3].sizes == replacements(small)[3].sizes
    assert found["predicted_ms"] == TABLE_32.predict(map(len, kept.values())) <= 5.0 == found["target_ms"]


def test_prune_meets_a_latency_and_a_resumed_run_decides_the_same(far, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "SECONDS", 0.3)
    monkeypatch.setattr(latency, "measure", lambda *args: TABLE_32)
    argv = ["--target-latency", "6", "--prune-mlp", "0.5"]
    report = run(tmp_path / "run", far, *argv)
    assert "ms, target 6.00 ms (" in capsys.readouterr().out
    found = report["rows"][2]["latency"]
    assert 3 <= found["predicted_ms"] <= found["target_ms"] == 6 and found["measured_ms"] > 0
    assert latency.read_table(tmp_path / "run" / latency.FILE, 32) == TABLE_32
    units = load_model(tmp_path / "run/best.pth")[1].units
    sizes = [u for heads in units.values() for pair in heads for u in pair]
    assert set(sizes) <= {1, 16, 32} and TABLE_32.predict([*sizes, *[32] * (16 - len(sizes))]) <= 6
    for file in ("best.pth", "last.pth", "result.json", "prune_report.json"):
        (tmp_path / "run" / file).unlink(missing_ok=True)
    monkeypatch.setattr(latency, "measure", None)
    run(tmp_path / "run", far, *argv, "--resume")
    assert load_model(tmp_path / "run/best.pth")[1].units == units


def test_a_target_that_nothing_can_meet_is_one_line_before_anything_trains(mistake, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    said = "--target-latency 0.001: is 0.00 ms, and one unit"
    mistake(f"--model-path FAR {' '.join(SMALL)} --target-latency 0.001", said, script=prune.main)
