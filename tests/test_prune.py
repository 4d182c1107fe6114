"""Scores and regularizers against written-out loops, shrinking against zeroed groups, prune.py from the outside."""

import functools
import signal
from dataclasses import replace

import pytest
import torch

import main
import prune
from engine import hoyer, shrink
from models.bigru import DirectionGRU
from models.bilstm import DirectionLSTM
from models.mingru import DirectionMinGRU
from models.replace import FarConfig, build, count_parameters, describe, load_model, mlps, replacements
from tests.conftest import QUIET, Started, assert_equal, relative_error, report, rows, run_ranks, wait_for, weights
from utils.checkpoint import load

UNITS = {"0": [[5, 32], [1, 7]], "2": [[32, 32], [3, 2]]}
CONFIG = FarConfig("DeiT-Micro", 10, 16, replaced=(0, 2, 3), units=UNITS, mlp={"1": 17})
SMALL = [
    *"--dataset DIGITS --batch-size 24 --ft-batch-size 24 --train-subset 0.05 --holdout 0.02".split(),
    *QUIET,
    *"--epochs 1 --ft-epochs 1 --decay 1e-2".split(),
    *"--score norm --no-refit".split(),
]


RECURRENT = pytest.mark.parametrize("rep_by", ["multi-lstm", "gru", "mingru"])


def ragged(rep_by="multi-lstm"):
    model = build(replace(CONFIG, rep_by=rep_by)).double().eval()
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def group_by_hand(attn, h, r, j):
    """Every weight that dies with unit j, listed one by one."""
    lstm, proj = attn.lstm[h][r], attn.head_proj[h].weight
    u, group = lstm.units, []
    gates = len(lstm.bias_ih) // u
    for gate in range(gates):
        row = gate * u + j
        group += [*lstm.weight_ih[row], lstm.bias_ih[row]]
        if gates > 2:  # a minGRU has no W_hh
            group += [*lstm.weight_hh[row], lstm.bias_hh[row]]
            group += [lstm.weight_hh[gate * u + k, j] for k in range(u) if k != j]
    assert gates == {DirectionLSTM: 4, DirectionGRU: 3, DirectionMinGRU: 2}[type(lstm)]
    return torch.stack([*group, *proj[:, j + (attn.lstm[h][0].units if r else 0)]])


@RECURRENT
def test_unit_norms_are_those_of_groups_written_out(rep_by):
    model = ragged(rep_by)
    norms = hoyer.unit_norms(replacements(model))
    assert [len(norms[0, h, r]) for h in (0, 1) for r in (0, 1)] == [5, 32, 1, 7]
    for block, h, r in [(0, 0, 0), (0, 1, 1), (2, 1, 0), (3, 1, 1)]:
        groups = [group_by_hand(model.blocks[block].attn, h, r, j) for j in range(len(norms[block, h, r]))]
        expected = torch.stack([group.norm() for group in groups])
        torch.testing.assert_close(norms[block, h, r], expected, rtol=1e-12, atol=0)
    mlp = model.blocks[1].mlp
    groups = [torch.cat([mlp.fc1.weight[j], mlp.fc1.bias[j : j + 1], mlp.fc2.weight[:, j]]) for j in range(17)]
    expected = torch.stack([group.norm() for group in groups])
    torch.testing.assert_close(hoyer.unit_norms(mlps(model))[1,], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_regularizers_equal_a_loop_and_pass_gradcheck(kind):
    s = torch.rand(9, dtype=torch.float64) + 0.1
    total, squares = sum(v.item() for v in s), sum(v.item() ** 2 for v in s)
    expected = {1: total, 2: total / squares**0.5, 3: total**2 / squares}[kind]
    regularizer = hoyer.REGULARIZERS[kind]
    assert regularizer(s).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(regularizer, s.clone().requires_grad_())
    ratio = (regularizer(7 * s) / regularizer(s)).item()
    assert ratio == pytest.approx(7 if kind == 1 else 1)
    both = hoyer.penalty({(0, 0): s, (1, 0): 2 * s[:4], (1, 1): 2 * s[4:]}, regularizer).item()
    assert both == pytest.approx(expected * (3 if kind == 1 else 2))


def test_hoyer_square_lies_between_one_and_the_number_of_groups():
    assert hoyer.group_hoyer_square(torch.tensor([0.0, 3.0, 0.0])).item() == pytest.approx(1)
    assert hoyer.group_hoyer_square(torch.full((6,), 0.2)).item() == pytest.approx(6)


def test_norms_of_zeroed_groups_are_zero_and_their_gradient_is_finite():
    model = ragged()
    direction = model.blocks[0].attn.lstm[0][1]
    with torch.no_grad():
        for p in model.blocks[0].attn.parameters():
            p.zero_()
    s = hoyer.unit_norms(replacements(model))[0, 0, 1]
    assert s.abs().max() == 0
    s.sum().backward()
    assert torch.isfinite(direction.weight_hh.grad).all()


@RECURRENT
def test_shrinking_zeroed_units_keeps_the_output(rep_by):
    model = ragged(rep_by)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kept, mlp = {}, {}
    with torch.no_grad():
        for (block, h, r), s in hoyer.unit_norms(replacements(model)).items():
            stay = torch.rand(len(s)) < 0.6
            stay[torch.randint(len(s), ())] = True
            attn, u = model.blocks[block].attn, len(s)
            gone = (~stay).nonzero().flatten()
            for name, w in attn.lstm[h][r].named_parameters():
                w.unflatten(0, (-1, u))[:, gone] = 0
                if name == "weight_hh":
                    w[:, gone] = 0
            attn.head_proj[h].weight[:, gone + (attn.lstm[h][0].units if r else 0)] = 0
            kept[block, h, r] = stay.nonzero().flatten()
        for (block,), s in hoyer.unit_norms(mlps(model)).items():
            m, gone = model.blocks[block].mlp, torch.randperm(len(s))[: len(s) // 2]
            m.fc1.weight[gone], m.fc1.bias[gone], m.fc2.weight[:, gone] = 0, 0, 0
            mlp[block,] = torch.tensor(sorted(set(range(len(s))) - set(gone.tolist())))
        before, size = model(images), count_parameters(model)
        shrink.shrink(replacements(model), kept)
        lstm_only = model(images)
        shrink.shrink(mlps(model), mlp)
        after = model(images)
    assert relative_error(lstm_only, before) < 1e-10 and relative_error(after, before) < 1e-10
    assert count_parameters(model) < size
    assert model.blocks[0].attn.sizes == [[len(kept[0, h, r]) for r in (0, 1)] for h in (0, 1)]
    again = build(describe(model, replace(CONFIG, rep_by=rep_by))).double().eval()
    again.load_state_dict(model.state_dict())
    assert relative_error(again(images), after) < 1e-12


def lists(kept):
    return {place: index.tolist() for place, index in kept.items()}


def test_selection_rules_on_a_case_by_hand():
    by_hand = {(0, 0, 0): [1.0, 3.0], (0, 0, 1): [0.2, 0.1], (1, 0, 0): [8.0, 10.0, 30.0]}
    norms = {place: torch.tensor(s) for place, s in by_hand.items()}
    # Block means are 1.075 and 16: relative .93 2.79 | .19 .09 | .5 .63 1.88
    assert lists(shrink.keep_above(norms, 0.6)) == {(0, 0, 0): [0, 1], (0, 0, 1): [0], (1, 0, 0): [1, 2]}
    assert lists(shrink.keep_share(norms, 5 / 7)) == {(0, 0, 0): [0, 1], (0, 0, 1): [0], (1, 0, 0): [1, 2]}
    assert lists(shrink.keep_top(norms, 3)) == {(0, 0, 0): [1], (0, 0, 1): [0], (1, 0, 0): [2]}  # one a place stays
    assert lists(shrink.keep_share(norms, 1.0)) == {(0, 0, 0): [0, 1], (0, 0, 1): [0, 1], (1, 0, 0): [0, 1, 2]}


@RECURRENT
def test_target_params_is_met_as_closely_as_one_unit_allows(rep_by):
    model = ragged(rep_by)
    norms, target = hoyer.unit_norms(replacements(model)), count_parameters(model) - 20_000
    kept = shrink.keep_within(model, norms, target)
    count = sum(map(len, kept.values()))
    more = shrink.parameters_after(model, shrink.keep_top(norms, count + 1))
    predicted = shrink.parameters_after(model, kept)
    shrink.shrink(replacements(model), kept)
    assert count_parameters(model) == predicted <= target < more


def run(folder, far, *argv):
    assert prune.main(["--model-path", str(far / "best.pth"), *SMALL, "--output-dir", str(folder), *argv]) == 0
    return report(folder, "prune_report.json")


@pytest.fixture(scope="module")
def pruned(far, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune") / "run"
    return folder, run(folder, far, "--keep-ratio", "0.5", "--prune-mlp", "0.25", "--base-weight", str(teacher))


def test_prune_shrinks_reports_and_its_checkpoint_rebuilds_alone(pruned, tmp_path):
    folder, report = pruned
    assert [row["when"] for row in report["rows"]] == ["before", "regularized", "pruned", "fine-tuned"]
    before, _, _, after = report["rows"]
    assert (before["units"], after["units"]) == (512, 256)
    assert all(after[size] < before[size] for size in ("parameters", "macs", "bytes"))
    assert report["teacher"]["agreement"] == 100 and report["teacher"]["parameters"] < before["parameters"]
    assert '"distill_loss": "preserve"' in (folder / "args.json").read_text()  # for a run that goes on
    model, config = load_model(folder / "best.pth", "--test")
    assert config.pruned and count_parameters(model) == after["parameters"]
    assert sum(block.mlp.fc1.out_features for block in model.blocks) == 256
    for name in ("units.png", "regularize.png"):
        assert (folder / name).stat().st_size > 5000
    steps = rows(folder / "regularize", "steps.jsonl")
    assert {"loss", "hoyer_square", "sparsity"} <= steps[0].keys() and 16 < steps[0]["hoyer_square"] < 512
    common = ["--dataset", "DIGITS", "--far-weight", str(folder / "best.pth"), "--num-workers", "0"]
    assert main.main(["--mode", "eval", *common]) == 0
    ds = ["--mode", "downstream", "--ds-pruned", "--train-subset", "0.05", "--batch-size", "24", "--epochs", "1"]
    assert main.main([*ds, *common, "--output-dir", str(tmp_path / "ds")]) == 0
    assert load_model(tmp_path / "ds/best.pth", "--test")[1].units == config.units


def test_curves_are_made_of_the_steps_that_are_logged(far, tmp_path):
    """Of 56 steps an epoch every second; the epoch's mean is of all."""
    few = ["--train-subset", "0.04", "--batch-size", "1", "--reg", "0", "--epochs", "1", "--ft-epochs", "0"]
    run(tmp_path / "run", far, "--keep-ratio", "0.5", *few)
    (_, row), steps = (rows(tmp_path / "run/regularize", name) for name in ("log.jsonl", "steps.jsonl"))
    assert [step["step"] for step in steps] == list(range(0, 56, 2))
    for name in ("hoyer_square", "sparsity"):
        assert row["train"][name] == pytest.approx(sum(step[name] for step in steps) / 28, rel=0.01)
    assert row["train"].keys() == {"loss", "classification", "hoyer_square", "sparsity"}


def test_a_pruned_model_can_be_pruned_again(pruned, tmp_path):
    report = run(tmp_path / "again", pruned[0], "--keep-ratio", "0.5", "--epochs", "0", "--ft-epochs", "0")
    assert report["rows"][-1]["units"] == 128


CHANGES = {  # by what trains
    "--epochs 0 --ft-epochs 0": "--prune-mlp, --score carried, --refit, --sensitivity 0.9, --target-params 250000",
    "--ft-epochs 0": "--reg 1, --decay 10, --lr 1e-2, --no-distill",
    "--epochs 0": "--ft-lr 1",
}


@pytest.fixture(scope="module")
def weights_after(far, teacher, tmp_path_factory):
    """The pruned weights that flags lead to."""

    @functools.cache
    def get(flags):
        folder, base = tmp_path_factory.mktemp("flags") / "run", "--seed 1 --select last --base-weight"
        run(folder, far, *base.split(), str(teacher), *flags.split())
        return weights(folder, "best.pth")

    return get


@pytest.mark.parametrize(("base", "flags"), [(base, flag) for base in CHANGES for flag in CHANGES[base].split(", ")])
def test_each_pruning_flag_changes_the_result(base, flags, weights_after):
    pairs = zip(weights_after(base).values(), weights_after(f"{base} {flags}").values(), strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def configured(flags):
    return prune.configure(prune.build_parser().parse_args(flags.split()))


def test_defaults_are_the_published_ones_and_what_measured_best():
    default = configured("--scale Small")
    assert (default.reg, default.decay, default.ft_optim.epochs, default.ft_optim.lr) == (3, 1e-4, 30, 5e-6)
    assert (default.ft_optim.batch_size, default.score, default.refit) == (256, "carried", True)
    for flags, share in {"": 0.6, "--score norm": 1.0, "--sensitivity 0.3": 0.3}.items():
        assert configured(flags).threshold == share


def test_a_killed_pruning_resumes_bit_equal(far, tmp_path):
    argv = ["--model-path", str(far / "best.pth"), *SMALL, *"--ft-epochs 2 --ft-lr 1e-2 --keep-ratio 0.5".split()]
    whole = Started("prune.py", *argv, "--output-dir", "a", cwd=tmp_path).finish()
    assert whole.returncode == 0, whole.stderr
    job = Started("prune.py", *argv, "--output-dir", "b", cwd=tmp_path)
    wait_for((tmp_path / "b/last.pth").exists, job)  # it fine-tunes
    job.send_signal(signal.SIGKILL)
    assert job.finish().returncode == -signal.SIGKILL
    again = Started("prune.py", *argv, "--output-dir", "b", "--resume", cwd=tmp_path).finish()
    assert again.returncode == 0, again.stderr
    assert_equal(weights(tmp_path / "a", "best.pth"), weights(tmp_path / "b", "best.pth"))


def test_two_processes_prune_the_same_shapes_as_one(far, tmp_path):
    argv = ["--model-path", str(far / "best.pth"), *SMALL, "--drop-path", "0", "--sweep", "0.5,0.2", "--select", "last"]
    argv += ["--score", "carried", "--refit"]
    assert prune.main([*argv, "--output-dir", str(tmp_path / "a")]) == 0
    half = "--batch-size 12 --ft-batch-size 12 --output-dir b".split()
    two = run_ranks("prune.py", *argv, *half, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    for keep in ("keep-0.5", "keep-0.2"):
        a, b = (load(tmp_path / run / keep / "best.pth", "--test") for run in "ab")
        assert a["config"]["units"] == b["config"]["units"]
        for name in a["model"]:
            torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-2, atol=1e-3)
    points = report(tmp_path / "a", "prune_report.json")["sweep"]
    assert [p["units"] for p in points] == [256, 102] and (tmp_path / "a/sweep.png").stat().st_size > 5000
