"""Maps against what they are by definition; visualization.py from the outside."""

import re
from html import escape
from itertools import combinations
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.text import Text
from scipy.stats import spearmanr

import visualization
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.features import attention_weights
from models.replace import swap_attention
from plots import pictures
from plots.explain import influence, integrated_gradients, rank_correlation, z_of
from plots.figures import plain, training_curves
from plots.map_figures import Row, importance_maps, signed, token_matrices
from plots.page import Section, write_page
from plots.pictures import HOW_IMPORTANT, Gallery, Images, find_images, find_models, sampling
from tests.conftest import image_folder
from utils.configs import PictureConfig


def model(replaced=()):
    made = create_teacher("DeiT-Micro", 10, 16).eval()
    swap_attention(made, replaced, "multi-lstm")
    return made


def test_integrated_gradients_are_complete_and_those_of_a_slow_loop():
    m, images = model((1, 2)).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    baseline, classes = images.mean((2, 3), keepdim=True).expand_as(images), torch.tensor([3, 8])

    def logit(x, k):
        with torch.no_grad():
            return m(x)[:, classes[k]].item()

    maps = integrated_gradients(m, images, classes)
    rises = torch.tensor([logit(images[k : k + 1], k) - logit(baseline[k : k + 1], k) for k in range(2)])
    torch.testing.assert_close(maps.sum((1, 2)), rises.double(), rtol=1e-2, atol=1e-4)
    few = integrated_gradients(m, images, classes, steps=3)
    k, row, column, expected = 1, 9, 4, 0.0
    for share in (1 / 6, 3 / 6, 5 / 6):
        for channel in range(3):
            nudge = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
            nudge[0, channel, row, column] = 1e-4
            point, way = (1 - share) * baseline[k] + share * images[k], (images - baseline)[k, channel, row, column]
            expected += way * (logit(point + nudge, k) - logit(point - nudge, k)) / 2e-4 / 3
    torch.testing.assert_close(few[k, row, column], expected, rtol=1e-4, atol=1e-9)


def test_influence_is_the_norm_of_the_jacobian_and_probes_estimate_it():
    m = MultiHeadBiLSTM(8, 2, 6).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: m.mix(t[None])[0], x)  # (N, D, N, D)
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(influence(m, x), expected)
    torch.testing.assert_close(influence(m, x, [4, 1]), expected[[4, 1]])
    estimate = influence(m, x, None, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, expected, rtol=0.1, atol=1e-6)


def test_large_models_are_sampled_and_small_ones_exact():
    assert sampling(65, 64, 0) == (list(range(65)), None, "exact")
    work = []
    for tokens, dim in ((197, 192), (197, 768), (4097, 192)):
        chosen, probes, how = sampling(tokens, dim, 7)
        assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] == tokens - 1
        assert f"{len(chosen)} of {tokens} output tokens, {probes} random directions" in how and "seed 7" in how
        work.append(len(chosen) * probes * tokens * dim**2)
    assert max(work) < 1.3 * work[0]  # larger ones take no longer


def test_attention_weights_are_those_attention_uses():
    attn = model().blocks[0].attn
    x = torch.randn(2, 65, 64)
    v = attn.qkv(x)[..., 128:].view(2, 65, 2, 32).transpose(1, 2)
    torch.testing.assert_close(
        (attention_weights(attn, x) @ v).transpose(1, 2).flatten(2), z_of(attn, x), rtol=1e-4, atol=1e-5
    )


def test_rank_correlation_is_spearmans():
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a.flatten(), b.flatten()).statistic)
    assert rank_correlation(a, a.exp()) == pytest.approx(1)


def links(page: str) -> list[str]:
    return [unquote(link) for link in re.findall(r'(?:src|href)="([^"]+)"', page)]


def test_figures_of_a_teacher_and_a_far_model(teacher, far, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "EXACT_UP_TO", 0)  # the influence of 64 of the 65 tokens is sampled
    out = tmp_path / "out"
    argv = ["--base-weight", str(teacher), "--far-weight", str(far / "best.pth"), "--count", "2"]
    assert visualization.main([*argv, "--block", "2", "--output-dir", str(out)]) == 0
    maps = ["importance-0", "importance-1"]
    names = [*maps, "similarity-of-tokens", "influence"]
    made = sorted([f"{n}.png" for n in names] + [f"{n}.npz" for n in names] + ["index.html"])
    assert sorted(p.name for p in out.iterdir()) == made
    arrays = np.load(out / "influence.npz")
    assert arrays["FAR ‖∂z/∂x‖ block 2"].shape == (64, 65) and "attention weights block 2" in arrays
    found = [np.load(out / f"{name}.npz") for name in maps]
    rho = signed(np.mean([spearmanr(m["FAR"].ravel(), m["teacher"].ravel()).statistic for m in found]))
    said, page = capsys.readouterr().out, (out / "index.html").read_text()
    assert f"importance: rank correlation of FAR with teacher, mean over the images: {rho}\n" in said
    assert str(out / "index.html") in said and set(links(page)) == {f"{n}.png" for n in names}
    text = re.sub("<[^>]*>", "", page)
    assert "326,602" in text and "DIGITS, evaluation image 359, labelled “4”" in text
    assert f"mean over the imagesFAR{rho}" in text.replace("\n", "")

    models, config, _ = find_models(PictureConfig(base_weight=teacher, far_weight=far / "best.pth"))
    images = find_images(PictureConfig(count=2), config).read
    plain_images = images.mean((2, 3), keepdim=True).expand_as(images)
    with torch.no_grad():
        named = models["teacher"](images).argmax(1, keepdim=True)  # all maps explain the class that the first one names
        for name, m in models.items():
            rises = (m(images) - m(plain_images)).gather(1, named)[:, 0]
            np.testing.assert_allclose([shown[name].sum() for shown in found], rises, rtol=0.02, atol=0.02)


def test_colours_are_a_patchs_share_of_its_map(tmp_path):
    images = Images(torch.zeros(1, 3, 32, 32), np.zeros((1, 32, 32, 3)), ["zero"], ())
    patches = torch.zeros(8, 8)
    patches[2, 5], patches[6, 1] = 3.0, -1.0
    smooth = Gallery({"FAR": None}, images, [0], tmp_path, "png", 0, torch.device("cpu"))._smooth(patches)
    assert smooth.shape == (32, 32) and smooth.sum() / 16 == pytest.approx(50, rel=0.05)  # a patch has 16 pixels
    assert smooth[8:12, 20:24].max() == smooth.max() == pytest.approx(75, rel=0.1)


def test_a_page_shows_names_as_they_are_and_links_relatively(tmp_path):
    name, folder = "<script>&\"'", tmp_path / "c"
    section = Section(name, name, [[name]], [(tmp_path / "b/a #1 <i>.png", name), (tmp_path / "c.pdf", name)])
    folder.mkdir()
    write_page(folder / "index.html", name, [section])
    page = (folder / "index.html").read_text()
    assert "<script" not in page and page.count(escape(name)) == 8
    assert links(page) == ["../b/a #1 <i>.png", "../b/a #1 <i>.png", "../c.pdf"]


def test_importance_maps_share_one_scale_and_lie_over_the_image():
    rng = np.random.default_rng(0)
    maps = {f"model {k} says “7$_”": rng.normal(size=(56, 56)) * 10.0**-k for k in range(3)}
    figure = importance_maps(rng.random((56, 56, 3)), "a cat", maps, HOW_IMPORTANT + " and more" * 5, "share")
    figure.draw_without_rendering()
    written = {text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if text.get_text()}
    (caption,) = [text for text in written if text.startswith(HOW_IMPORTANT[:30])]
    (bar,) = [axes for axes in figure.findobj(Axes) if axes.get_ylabel() == "share"]
    top = np.percentile(np.abs(list(maps.values())), 99)
    assert bar.get_ylim() == pytest.approx((-top, top))
    panels = {axes.get_title(): axes for axes in figure.findobj(Axes) if axes.images}
    assert list(panels) == ["image", *maps]
    for name, values in maps.items():
        below, laid = panels[name].images
        np.testing.assert_allclose(laid.get_array(), colormaps["PuOr"]((values / top + 1) / 2), atol=1e-6)
        assert laid.get_extent() == below.get_extent() == [0, 56, 56, 0]
    boxes = [written[text] for text in ("a cat", caption, *panels)] + [bar.get_tightbbox()]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("blocks", [1, 12])
def test_token_matrices_share_a_scale_a_row_and_use_the_page(blocks):
    rng = np.random.default_rng(0)
    maps = [{i: rng.normal(size=(9, 17)) * 10.0**-k for i in range(blocks)} for k in range(2)]
    rows = [
        Row("teacher says “7$_”", maps[0], True, "u", None, {}),
        Row("FAR says “7$_”", maps[1], True, "u", None, dict.fromkeys(range(blocks), -0.004)),
    ]
    figure = token_matrices("tokens", rows, ("token", "token"), "purple is alike")
    figure.draw_without_rendering()
    titles = [axes.get_title() for axes in figure.findobj(Axes)]
    assert sum(title.startswith("block") for title in titles) == 2 * blocks and "block 0, ρ 0.00" in titles
    said = [text.get_text() for text in figure.findobj(Text)]
    assert "purple is alike" in said and "FAR says “7$_”" in said
    teacher, far = [axes.get_ylim()[1] for axes in figure.findobj(Axes) if axes.get_ylabel() == "u"]
    assert teacher > 5 * far
    width, height = figure.get_size_inches()
    assert width < 20 and height < 2 * width


def test_ticks_are_as_a_person_writes_them():
    shown = {7.25: "7.25", 0.002: "0.002", 4097: "4,097", 5e-5: "5e−5", 2e6: "2e6", -0.5: "−0.5", 0: "0"}
    assert {value: plain(value) for value in shown} == shown


def test_curves_are_a_line_a_stage_and_loss():
    rows = []
    for index, (stage, epochs) in enumerate({"attn": 3, "block": 2, "head": 1}.items()):
        for epoch in range(epochs + 1):
            train = {"loss": 2.0 + index, "similarity": 1.0, "classification": 1.0, "hoyer_square": 500.0}
            val = {"loss": 0.5, "acc1": 90.0, "acc5": 99.0}
            row = {"stage": stage, "stage_index": index, "epoch": epoch, "lr": 0.1, "val": val}
            rows.append({**row, "train": train if epoch else {}})
    loss, accuracy, rate = training_curves(rows).axes
    named = ["classification", "evaluation cross entropy", "similarity", "training loss"]
    assert sorted(text.get_text() for text in loss.get_legend().get_texts()) == named  # once each
    curves = [tuple(line.get_xdata()) for line in loss.lines if line.get_linestyle() in ("-", "--")]
    for begin, end in ((0, 3), (3, 5), (5, 6)):  # epochs go on from stage to stage
        assert curves.count(tuple(range(begin + 1, end + 1))) == 3 and curves.count(tuple(range(begin, end + 1))) == 1
    assert len(rate.lines) == 3 + 2 and rate.get_legend() is None
    assert [t.get_text() for t in accuracy.child_axes[0].get_xticklabels()] == ["attn", "block", "head"]


def test_other_formats_and_images_of_ones_own(far, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "EXACT_UP_TO", 0)
    root, out = image_folder(tmp_path / "images", classes=1, count=2) / "val/class0", tmp_path / "out"
    argv = ["--far-weight", far / "best.pth", "--images", root, "--block", "0", "--format", "pdf", "--output-dir", out]
    assert visualization.main(list(map(str, argv))) == 0
    assert (out / "importance-1.pdf").stat().st_size > 3000
