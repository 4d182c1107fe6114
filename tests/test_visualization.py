"""Maps against what they are by definition; visualization.py from the outside."""

from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import spearmanr

import visualization
from datasets.registry import photographs
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.features import attention_weights
from models.replace import FarConfig, build, pack, swap_attention
from plots.explain import influence, integrated_gradients, rank_correlation, z_of
from plots.figures import fidelity_by_block, logarithmic, plain, training_curves
from plots.map_figures import Row, importance_maps, signed, token_matrices
from plots.page import Section, write_page
from plots.pictures import HOW_IMPORTANT, Gallery, find_images, find_models, sampling
from tests.conftest import image_folder
from utils.configs import PictureConfig


def model(replaced=()):
    made = create_teacher("DeiT-Micro", 10, 32).eval()
    swap_attention(made, replaced, "multi-lstm")
    return made


def test_integrated_gradients_are_complete_and_those_of_a_slow_loop():
    m, images = model((1, 2)).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    baseline, classes = images.mean((2, 3), keepdim=True).expand_as(images), torch.tensor([3, 8])

    def logit(x, k):
        with torch.no_grad():
            return m(x)[:, classes[k]].item()

    maps = integrated_gradients(m, images, classes)
    rises = torch.tensor([logit(images[k : k + 1], k) - logit(baseline[k : k + 1], k) for k in range(2)])
    torch.testing.assert_close(maps.sum((1, 2)), rises.double(), rtol=1e-2, atol=1e-4)
    few = integrated_gradients(m, images, classes, steps=3)
    k, row, column, expected = 1, 17, 4, 0.0
    for share in (1 / 6, 3 / 6, 5 / 6):
        for channel in range(3):
            nudge = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
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


class Links(HTMLParser):
    """The tags of a page, which must close in order, its links and its text."""

    def __init__(self, page: Path):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(page.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in ("meta", "img"))
        self.links += [unquote(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_figures_of_a_teacher_and_a_far_model(teacher, far, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--base-weight", str(teacher), "--far-weight", str(far / "best.pth"), "--count", "2"]
    assert visualization.main([*argv, "--block", "2", "--output-dir", str(out)]) == 0
    maps = ["importance-0", "importance-1"]
    names = [*maps, "similarity-of-tokens", "influence"]
    made = sorted([f"{n}.png" for n in names] + [f"{n}.npz" for n in names] + ["index.html"])
    assert sorted(p.name for p in out.iterdir()) == made
    arrays = np.load(out / "influence.npz")
    assert arrays["FAR ‖∂z/∂x‖ block 2"].shape == (65, 65) and "attention weights block 2" in arrays
    found = [np.load(out / f"{name}.npz") for name in maps]
    rho = signed(np.mean([spearmanr(m["FAR"].ravel(), m["teacher"].ravel()).statistic for m in found]))
    said = capsys.readouterr()
    assert f"importance: rank correlation of FAR with teacher, mean over the images: {rho}\n" in said.out
    assert str(out / "index.html") in said.out
    page = Links(out / "index.html")
    assert set(page.links) == {f"{n}.png" for n in names}
    assert "326,602" in page.text and "DIGITS, evaluation image 359, labelled “4”" in page.text
    assert f"mean over the imagesFAR{rho}" in page.text.replace("\n", "")


def test_maps_explain_the_class_that_the_first_model_names_as_shares_of_its_logit(teacher, far, tmp_path):
    files = {"teacher": teacher, "FAR": far / "best.pth"}
    models, config, _ = find_models(PictureConfig(base_weight=files["teacher"], far_weight=files["FAR"]))
    images = find_images(PictureConfig(count=2), config)
    gallery = Gallery(models, images, [0], tmp_path, "png", 0, torch.device("cpu"))
    gallery.importance()
    patches = torch.zeros(8, 8)
    patches[2, 5], patches[6, 1] = 3.0, -1.0
    smooth = gallery._smooth(patches)  # shares of the map, over the image
    assert smooth.shape == (32, 32) and smooth.sum() / 16 == pytest.approx(50, rel=0.05)  # a patch has 16 pixels
    assert smooth[8:12, 20:24].max() == smooth.max() == pytest.approx(75, rel=0.1)
    x = images.read
    with torch.no_grad():
        named = models["teacher"](x).argmax(1, keepdim=True)
        for name, m in models.items():
            rises = (m(x) - m(x.mean((2, 3), keepdim=True).expand_as(x))).gather(1, named)[:, 0]
            sums = [np.load(tmp_path / f"importance-{k}.npz")[name].sum() for k in range(2)]
            np.testing.assert_allclose(sums, rises, rtol=0.02, atol=0.02)


def test_a_page_shows_names_as_they_are_and_links_relatively(tmp_path):
    figure, shown = tmp_path / "b/a #1 <i>.png", "<script>&\"'"
    section = Section(shown, shown, [[shown, shown], ["x", shown]], [(figure, shown), (tmp_path / "c.pdf", shown)])
    (tmp_path / "c").mkdir()
    write_page(tmp_path / "c/index.html", shown, [section])
    page = Links(tmp_path / "c/index.html")
    assert page.links == ["../b/a #1 <i>.png", "../b/a #1 <i>.png", "../c.pdf"]
    assert page.text.count(shown) == 9 and "<script" not in (tmp_path / "c/index.html").read_text()


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


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
        _, laid = panels[name].images
        colours = colormaps["PuOr"]((values / top + 1) / 2)
        np.testing.assert_allclose(laid.get_array(), colours, atol=1e-6)
        assert laid.get_extent() == panels[name].images[0].get_extent() == [0, 56, 56, 0]
    boxes = [written[text] for text in ("a cat", caption, *panels)] + [bar.get_tightbbox()]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("blocks", [1, 12, 24])
def test_token_matrices_share_a_scale_a_row_and_use_the_page(blocks):
    rng = np.random.default_rng(0)
    rows = [
        Row(f"{name} says “7$_”", {i: rng.normal(size=(9, 17)) * 10.0**-k for i in range(blocks)}, True, "u", None, rho)
        for k, (name, rho) in enumerate({"teacher": {}, "FAR": dict.fromkeys(range(blocks), -0.004)}.items())
    ]
    figure = token_matrices("tokens", rows, ("token", "token"), "purple is alike")
    figure.draw_without_rendering()
    panels = [axes for axes in figure.findobj(Axes) if axes.get_title().startswith("block")]
    assert len(panels) == 2 * blocks
    said = texts(figure)
    assert "purple is alike" in said and "FAR says “7$_”" in said and "block 0, ρ 0.00" in said
    bars = [axes for axes in figure.findobj(Axes) if axes.get_ylabel() == "u"]
    assert len(bars) == 2 and bars[0].get_ylim()[1] > 5 * bars[1].get_ylim()[1]
    width, height = figure.get_size_inches()
    assert width < 20 and height < 2 * width


def test_ticks_are_as_a_person_writes_them():
    assert [plain(v) for v in (7.25, 0.002, 4097, 5e-5, 2e6, -0.5, 0)] == [
        *("7.25", "0.002", "4,097", "5e−5", "2e6", "−0.5", "0")
    ]
    for low, high in ((7.1, 7.4), (0.01, 8), (0.4, 60), (1e-6, 1e3), (0, 5), (3, 3)):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([low, high])
        logarithmic(axes.yaxis, [low, high])
        figure.draw_without_rendering()
        shown = [tick.get_text() for tick in axes.get_yticklabels() if tick.get_text()]
        assert len(shown) >= 3 and not any("$" in text or "10^" in text for text in shown), (low, high, shown)
        assert not any(text.get_text() for text in axes.get_yticklabels(minor=True))


def stage_rows(stages: dict[str, int], terms=("similarity", "classification")) -> list[dict]:
    rows = []
    for index, (stage, epochs) in enumerate(stages.items()):
        for epoch in range(epochs + 1):
            train = {"loss": 2.0 + index, **dict.fromkeys(terms, 1.0), "hoyer_square": 500.0} if epoch else {}
            val = {"loss": 0.5, "acc1": 90.0, "acc5": 99.0}
            rows.append({"stage": stage, "stage_index": index, "epoch": epoch, "lr": 0.1, "train": train, "val": val})
    return rows


def test_curves_are_a_line_a_stage_and_loss():
    figure = training_curves(stage_rows({"attn": 3, "block": 2, "head": 1}))
    loss, accuracy, rate = figure.axes
    named = ["classification", "evaluation cross entropy", "similarity", "training loss"]
    assert sorted(text.get_text() for text in loss.get_legend().get_texts()) == named  # once each
    lines = [line for line in loss.lines if len(line.get_xdata()) and line.get_linestyle() in ("-", "--")]
    curves = [tuple(line.get_xdata()) for line in lines if len(set(line.get_ydata())) == 1]
    for begin, end in ((0, 3), (3, 5), (5, 6)):  # epochs go on from stage to stage
        assert curves.count(tuple(range(begin + 1, end + 1))) == 3 and curves.count(tuple(range(begin, end + 1))) == 1
    assert len(rate.lines) == 3 + 2 and rate.get_legend() is None
    assert [t.get_text() for t in accuracy.child_axes[0].get_xticklabels()] == ["attn", "block", "head"]
    for axes in figure.axes:
        assert not axes.get_legend() or not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_the_cosine_axis_ends_at_one():
    values = {str(i): v for i, v in enumerate((-0.3, 0.999, 0.5))}
    figure = fidelity_by_block({"after": {"z_similarity": values, "output_error": values}})
    low, high = figure.axes[0].get_ylim()
    assert high == 1 and low < -0.3


def test_other_formats_and_images_of_ones_own(far, tmp_path):
    root, out = image_folder(tmp_path / "images", classes=1, count=2) / "val/class0", tmp_path / "out"
    argv = ["--far-weight", far / "best.pth", "--images", root, "--block", "0", "--format", "pdf", "--output-dir", out]
    assert visualization.main(list(map(str, argv))) == 0
    assert (out / "importance-1.pdf").stat().st_size > 3000


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
