"""The study runs its rows by one command, goes on where it stopped, and averages what the runs reported."""

import pytest

import study
from tests.conftest import report
from utils.recipe import Recipe


def test_the_study_runs_named_rows_once_and_prints_their_means(tmp_path, capsys):
    argv = ["--epochs", "1", "--train-subset", "0.07", "--seeds", "4", "--rows", "refit, combine"]
    argv += ["--output-dir", str(tmp_path)]
    assert study.main(argv) == 0
    said, weights = capsys.readouterr().out, sorted(tmp_path.rglob("best.pth"))
    found = report(tmp_path, "study.json")
    pruned = [f"carried, refit, combine, keep {ratio}" for ratio in (0.5, 0.3, 0.1)]
    assert list(found) == ["preserve", *pruned]
    args = report(tmp_path / "4/block-preserve", "args.json")["args"]
    assert (args["holdout"], args["block_ft_train_loss"]) == (0.2, "preserve")
    times = [path.stat().st_mtime_ns for path in weights]
    assert study.main(argv) == 0
    assert [path.stat().st_mtime_ns for path in weights] == times and len(weights) == 7
    assert capsys.readouterr().out.splitlines()[-6:] == said.splitlines()[-6:]


def test_the_table_shows_means_and_extremes():
    def result(x):
        inside = {"z_similarity": {"0": x / 10, "1": 0.9}, "output_error": {"0": x, "1": 0.1}}
        return {"acc1": 90 + x, "agreement": 95 - x, "kl": x / 100, **inside}

    rows = study.table_rows({"row": [result(1), result(3)]})
    assert rows[-1] == ["row", "92.00", "93.00", "0.0200", "0.100", "3.000"]


@pytest.mark.parametrize("row", [*study.DISTILLING, *study.PRUNED])
def test_every_row_has_the_same_budget(row):
    if row in study.DISTILLING:
        attn, block = study.DISTILLING[row]
        lines, budget = [[*study.COMPARED_BLOCK, *block], [] if attn is None else [*study.COMPARED, *attn]], 32
    else:
        lines, budget = [[*study.PRUNING, *study.PRUNED[row]]], 9 if row in (study.FIRST, study.SECOND) else 18
    counted = ("--epochs", "--block-ft-epochs", "--ft-epochs")
    last = [
        {flag: int(value) for flag, value in zip(line, line[1:], strict=False) if flag in counted} for line in lines
    ]
    assert sum(sum(epochs.values()) for epochs in last) == budget


def test_a_second_step_prunes_what_the_first_left(tmp_path):
    assert study.chosen(["preserve, two steps", "then combine"]) == [
        *("preserve", "preserve, then combine", study.FIRST, study.SECOND)
    ]
    recipe, calls = Recipe(tmp_path, []), {}
    recipe.run = lambda script, name, *argv: calls.update({name: argv}) or {"sweep": [{"keep_ratio": 0.5}]}
    for row in (study.FIRST, study.SECOND):
        assert list(study.prune(recipe, [], row)) == [f"{row}, keep 0.5"]
    one, two = calls.values()
    ratios = [next(argv[i + 1] for i in range(len(argv) - 1, 0, -1) if argv[i] == "--sweep") for argv in (one, two)]
    assert float(ratios[0]) * float(ratios[1]) == pytest.approx(0.3, abs=1e-4)
    assert str(tmp_path / "block-preserve/best.pth") in one and "--keep-ratio" not in one
    assert str(tmp_path / list(calls)[0] / f"keep-{float(ratios[0]):g}/best.pth") in two
