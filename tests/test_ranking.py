"""--replace auto: what blocks cost against hybrids built by hand, the choice, and the run around it."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

import main
from datasets.loading import Data
from engine import modes, ranking
from engine.ranking import RANKINGS, Cost, Hybrids, Ranking, rank_blocks, read_ranking
from models.deit import create_teacher
from tests.conftest import BATCH, BLOCK_BATCH, DIGITS, FLOAT32, image_folder, report, run_ranks
from utils.checkpoint import load
from utils.configs import DataConfig
from utils.distributed import Context
from utils.errors import FarError

NOISE = {0: 0.06, 1: 0.002, 2: 0.4, 3: 0.01}  # how far the student's blocks are from its: 1 costs least, then 3, 0, 2


@pytest.fixture(scope="module")
def pair():
    """A teacher with much to say, and the same with noise in the weights of its blocks, in float64."""
    torch.manual_seed(0)
    teacher = create_teacher("DeiT-Micro", 6, 32).double().eval()
    for name, p in teacher.named_parameters():
        if "weight" in name and p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    student = copy.deepcopy(teacher)
    for i, scale in NOISE.items():
        for p in student.blocks[i].attn.parameters():
            p.data += scale * p.std(correction=0) * torch.randn_like(p)
    return teacher, student


@pytest.fixture(scope="module")
def images():
    return list(3 * torch.randn(5, 12, 3, 32, 32, dtype=torch.float64))


@pytest.fixture(scope="module")
def hybrids(pair, images):
    return Hybrids(*pair, images, Context(), FLOAT32)


@torch.no_grad()
def cost_by_hand(pair, images, replaced) -> Cost:
    teacher, student = pair
    hybrid = copy.deepcopy(teacher)
    for i in replaced:
        hybrid.blocks[i].load_state_dict(student.blocks[i].state_dict())
    p, q = (model(torch.cat(images)).softmax(1) for model in (teacher, hybrid))
    kl = sum(sum(a * (a.log() - b.log()) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True))
    return Cost(kl.item() / len(p), 100 * (p.argmax(1) == q.argmax(1)).double().mean().item())


@pytest.mark.parametrize("replaced", [(), (2,), (0, 1, 3), (0, 1, 2, 3)])
def test_costs_are_those_of_hybrids_built_by_hand(replaced, pair, images, hybrids):
    for block, cost in hybrids.toggle_costs(replaced, (3, 0, 2)).items():
        expected = cost_by_hand(pair, images, set(replaced) ^ {block})
        assert cost.kl == pytest.approx(expected.kl, rel=1e-5, abs=1e-6)
        assert cost.agreement == pytest.approx(expected.agreement)


@pytest.mark.parametrize("name", ["alone", "restore", "greedy"])
def test_blocks_of_known_effect_are_ranked_by_it(name, hybrids):
    order = rank_blocks(name, hybrids).order
    # Beside the errors of all the others, what the two best add is less than how it happens to fall.
    assert order == (1, 3, 0, 2) or name == "restore" and order == (3, 1, 0, 2)


def test_greedy_takes_what_brute_force_finds_cheapest_at_each_step(pair, images, hybrids):
    found, taken = RANKINGS["greedy"](hybrids), []
    for _ in range(4):
        costs = {b: cost_by_hand(pair, images, [*taken, b]).kl for b in range(4) if b not in taken}
        taken.append(min(costs, key=costs.get))
        assert found[taken[-1]] == pytest.approx(costs[taken[-1]], rel=1e-5)
    assert list(found) == taken


def test_the_path_is_what_the_first_blocks_cost_together(pair, images, hybrids):
    result = rank_blocks("spacing", hybrids)
    expected = [cost_by_hand(pair, images, result.order[:k]).agreement for k in range(1, 5)]
    assert [cost.agreement for cost in result.path] == pytest.approx(expected)
    assert min(cost.agreement for cost in result.path) < 100


def test_entropy_is_that_of_the_attention_weights(pair, images, hybrids):
    teacher, seen = pair[0], []
    for block in teacher.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        teacher(torch.cat(images))
    expected = [-(w * w.log()).sum(-1).mean().item() for w in seen]
    assert list(hybrids.entropy().values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("depth", "first"), [(12, {3, 7, 11, 0}), (4, {1, 3, 0, 2})])
def test_spacing_spreads_whatever_is_measured(depth, first):
    order = sorted(scores := ranking.spacing(type("Deep", (), {"depth": depth})), key=scores.get)
    assert sorted(order) == list(range(depth))
    gaps = torch.tensor(sorted([-1, *order[: depth // 2], depth])).diff()
    assert gaps.max() <= 4, order


PATH = (Cost(0.0, 100.0), Cost(0.1, 97.5), Cost(0.2, 98.0), Cost(0.9, 60.0))
RANKED = Ranking("greedy", {0: 3.0, 1: 0.0, 2: 2.0, 3: 1.0}, (1, 3, 2, 0), PATH)


def test_the_choice_keeps_as_many_as_agree_enough_also_at_equality():
    assert RANKED.choose(2, None) == (1, 3)
    for least, expected in ((98.0, (1, 2, 3)), (98.1, (1,)), (100, (1,)), (10, (0, 1, 2, 3))):
        assert RANKED.choose(None, least) == expected
    worse = replace(RANKED, path=PATH[1:] + PATH[3:])
    with pytest.raises(FarError, match=r"--min-agreement 99: with 2 of 4 blocks replaced 98\.00 % stay"):
        worse.choose(None, 99)


RUN = ["--mode", "train", *DIGITS, *BATCH, *BLOCK_BATCH, *"--epochs 1 --block-ft-epochs 1 --select last".split()]
AUTO = [*RUN, "--train-loss", "preserve", "--replace", "auto:2"]


def test_a_run_ranks_between_its_stages_and_resumes_in_the_middle(teacher, tmp_path, monkeypatch, capsys):
    flags = [*AUTO, "--base-weight", str(teacher), "--rank", "alone"]
    assert main.main([*flags, "--output-dir", str(tmp_path / "whole")]) == 0
    assert "stage attn: " in (said := capsys.readouterr().out) and "similarity+squared_error" in said
    kept = sorted(report(tmp_path / "whole", "ranking.json")["ranking"]["order"][:2])
    assert (tmp_path / "whole/ranking.png").stat().st_size > 5000
    whole, before = load(tmp_path / "whole/best.pth", "--t"), load(teacher, "--t")["model"]
    assert list(whole["config"]["replaced"]) == kept
    for i in set(range(4)) - set(kept):
        block = {name: w for name, w in before.items() if name.startswith(f"blocks.{i}.")}
        assert block and all(torch.equal(whole["model"][name], w) for name, w in block.items())

    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(modes, "rank_blocks", None)  # the power is gone
        main.main([*flags, "--output-dir", str(tmp_path / "cut")])
    capsys.readouterr()
    assert main.main([*flags, "--output-dir", str(tmp_path / "cut"), "--resume"]) == 0
    cut = load(tmp_path / "cut/best.pth", "--t")["model"]
    assert all(torch.equal(cut[name], w) for name, w in whole["model"].items())
    assert "stage attn: " not in capsys.readouterr().out  # it is not trained again


def test_two_processes_choose_alike(teacher, far, tmp_path):
    flags = ["--base-weight", str(teacher), "--attn-weight", str(far / "best.pth"), "--skip-train-attn"]
    flags = [*RUN, *flags, "--replace", "auto", "--min-agreement", "0.1"]
    assert main.main([*flags, "--output-dir", str(tmp_path / "one")]) == 0
    two = run_ranks("main.py", *flags, "--output-dir", "two", cwd=tmp_path)
    assert two.returncode == 0 and two.stdout.count("--replace auto keeps blocks") == 1, two
    one, two = (report(tmp_path / name, "ranking.json")["ranking"]["order"] for name in ("one", "two"))
    assert one == two
    kept = [load(tmp_path / name / "best.pth", "--t")["config"]["replaced"] for name in ("one", "two")]
    assert kept[0] == kept[1]


def test_images_are_kept_aside_from_all_of_a_sorted_folder_and_never_trained_on(tmp_path):
    config = DataConfig("FOLDER", image_folder(tmp_path, classes=6, count=20, size=8), 32, num_workers=0)
    data = Data(replace(config, aside=12), Context())
    labels = [label for _, batch in data.aside_loader(5) for label in batch.tolist()]
    assert len(labels) == 12 and len(set(labels)) > 3 and len(Data(replace(config, aside=99), Context()).aside) == 15
    assert not set(data.aside.data.indices) & set(data.train.data.indices)
    assert len(data.aside) + len(data.train) == 120
    shares = [Data(replace(config, aside=12), Context(rank, 5)).aside_loader(2).dataset.indices for rank in range(5)]
    assert sorted(i for share in shares for i in share) == list(range(12))


def test_a_ranking_is_read_back(tmp_path):
    file = tmp_path / "ranking.json"
    file.write_text(json.dumps({"ranking": asdict(RANKED)}))
    assert read_ranking(file, 4) == RANKED
    for change in ({"scores": {}}, {"order": "1"}, {"path": []}, {"path": [{}] * 4}):
        file.write_text(json.dumps({"ranking": {**asdict(RANKED), **change}}))
        with pytest.raises(FarError, match="damaged"):
            read_ranking(file, 4)
    file.write_text(json.dumps({"ranking": asdict(RANKED)}))
    with pytest.raises(FarError, match="damaged"):
        read_ranking(file, 5)  # of another model


@pytest.mark.parametrize("given", [False, True])
def test_a_dry_run_says_what_is_left_and_written(given, teacher, far, capsys):
    """Of all blocks replaced by --attn-weight, too, those that are not chosen get their attention back."""
    flags = ["--skip-train-attn", "--attn-weight", str(far / "best.pth")] if given else []
    assert main.main([*AUTO, "--base-weight", str(teacher), *flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "leaves        2 of 4 blocks" in said and "159,232 of 267,338 parameters" in said
    assert "ranking.json, ranking.png" in said and ("attn/" in said) != given
    assert "126 training, 172 to rank blocks on" in said
