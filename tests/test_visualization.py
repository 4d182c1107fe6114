"""Maps against what they are by definition; visualization.py from the outside."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import visualization
from datasets.registry import photographs
from engine.distill import forward_features
from engine.explain import attention_rollout, attention_weights, influence, rank_correlation, token_importance, z_of
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.replace import FarConfig, build, pack, swap_attention
from tests.conftest import image_folder


def model(replaced=()):
    made = create_teacher("DeiT-Micro", 10, 32).eval()
    swap_attention(made, replaced, "multi-lstm")
    return made


@pytest.mark.parametrize("replaced", [(), (0, 1, 2, 3)])
def test_importance_is_the_derivative_of_the_logit_as_the_token_is_scaled(replaced):
    m, images = model(replaced).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    maps, classes = token_importance(m, images, (1, 3))
    for block in (1, 3):
        for token in (0, 5, 64):

            def logit(scale, block=block, token=token):
                def change(_, args):
                    x = args[0].clone()
                    x[:, token] *= scale
                    return (x,)

                handle = m.blocks[block].attn.register_forward_pre_hook(change)
                out = m(images).gather(1, classes[:, None])[:, 0]
                handle.remove()
                return out.detach()

            slope = (logit(1 + 1e-5) - logit(1 - 1e-5)) / 2e-5
            torch.testing.assert_close(maps[block][:, token], slope, rtol=1e-4, atol=1e-8)


def test_influence_is_the_norm_of_the_jacobian_and_probes_estimate_it():
    m = MultiHeadBiLSTM(8, 2, 6).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: m.mix(t[None])[0], x)  # (N, D, N, D)
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(influence(m, x), expected)
    estimate = influence(m, x, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, expected, rtol=0.1, atol=1e-6)


def test_attention_weights_are_those_attention_uses():
    attn = model().blocks[0].attn
    x = torch.randn(2, 65, 64)
    v = attn.qkv(x)[..., 128:].view(2, 65, 2, 32).transpose(1, 2)
    torch.testing.assert_close(
        (attention_weights(attn, x) @ v).transpose(1, 2).flatten(2), z_of(attn, x), rtol=1e-4, atol=1e-5
    )


def test_rollout_mixes_tokens_block_after_block_and_keeps_half_of_each():
    m, images = model(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for block in m.blocks:
            block.attn.qkv.weight[:128] *= 20  # fresh attention is nearly even: its product would have no order
    inputs = forward_features(m, images, range(4)).inputs
    rolled = attention_rollout(m, images)
    for image in range(2):
        reach = np.eye(65)  # row: token of the running state, column: share of each input token in it
        for i, block in enumerate(m.blocks):
            heads = attention_weights(block.attn, block.norm1(inputs[i]))[image].detach().double().numpy()
            mean = sum(heads[h] for h in range(2)) / 2
            before, reach = reach, np.zeros((65, 65))
            for token in range(65):
                reach[token] = before[token] / 2
                for other in range(65):
                    reach[token] += mean[token, other] / 2 * before[other]
        np.testing.assert_allclose(rolled[image], reach[0], rtol=1e-4, atol=1e-7)
        assert rolled[image].sum().item() == pytest.approx(1, abs=1e-5)


def test_rank_correlation_is_spearmans():
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.flatten(), b.flatten()).statistic)
    assert rank_correlation(a, a.exp()) == pytest.approx(1)


def test_figures_of_a_teacher_and_a_far_model(teacher, far, tmp_path, capsys):
    argv = [
        "--base-weight",
        str(teacher),
        "--far-weight",
        str(far / "best.pth"),
        "--count",
        "2",
        "--output-dir",
        str(tmp_path),
    ]
    assert visualization.main([*argv, "--block", "2"]) == 0
    names = ["importance-0", "importance-1", "similarity-of-tokens", "influence"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"{n}.png" for n in names] + [f"{n}.npz" for n in names]
    )
    arrays = np.load(tmp_path / "influence.npz")
    assert arrays["FAR ‖∂z/∂x‖ block 2"].shape == (65, 65) and "attention weights block 2" in arrays
    assert "rank correlation of FAR with teacher" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["pdf", "svg"])
def test_other_formats_and_images_of_ones_own(far, tmp_path, form):
    root = image_folder(tmp_path / "images", classes=1, count=2)
    argv = [
        "--far-weight",
        str(far / "best.pth"),
        "--images",
        str(root / "val/class0"),
        "--block",
        "0",
        "--format",
        form,
    ]
    assert visualization.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / f"out/importance-1.{form}").stat().st_size > 3000


def test_the_two_photographs_ship():
    assert {name: image.size for name, image in photographs().items()} == {"china": (640, 427), "flower": (640, 427)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--far-weight none.pth", "none.pth"),
        ("--images nowhere", "--images nowhere"),
        ("--block 9", "--block 9"),
        ("--dataset NO", "NO"),
    ],
)
def test_mistakes_are_one_line(flags, said, far, tmp_path, failure):
    assert said in failure(
        "--far-weight", far / "best.pth", "--output-dir", tmp_path / "o", *flags.split(), script=visualization.main
    )


def test_a_kernel_that_cannot_compute_a_model_is_told_before_a_folder_is_made(tmp_path, failure):
    config = FarConfig("DeiT-Micro", 10, 32, "gru", replaced=(1,))
    torch.save(pack(build(config), config), tmp_path / "gru.pth")
    argv = ["--far-weight", tmp_path / "gru.pth", "--output-dir", tmp_path / "o", "--lstm-backend", "cpu"]
    said = failure(*argv, script=visualization.main)
    assert "--lstm-backend cpu" in said and not (tmp_path / "o").exists()


def test_an_undecodable_image_is_named(far, tmp_path, failure):
    (tmp_path / "broken.png").write_bytes(b"no image")
    argv = ["--far-weight", far / "best.pth", "--output-dir", tmp_path / "o", "--images", tmp_path]
    assert "broken.png" in failure(*argv, script=visualization.main)


def test_without_a_demo_run_it_says_how_to_make_one(tmp_path, failure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make demo" in failure(script=visualization.main)
