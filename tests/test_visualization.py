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
from matplotlib.text import Annotation, Text
from scipy.stats import spearmanr

import visualization
from datasets.registry import photographs
from models.bilstm import MultiHeadBiLSTM
from models.deit import create_teacher
from models.features import forward_features
from models.replace import FarConfig, build, pack, swap_attention
from plots.explain import (
    attention_rollout,
    attention_weights,
    influence,
    integrated_gradients,
    rank_correlation,
    token_importance,
    z_of,
)
from plots.figures import accuracy_by_latency, fidelity_by_block, logarithmic, plain, sweep_curve, training_curves
from plots.map_figures import Row, block_maps, importance_maps, signed
from plots.page import Section, write_page
from plots.pictures import HOW_IMPORTANT, Images, PictureConfig, Pictures, find_images, find_models, sampling
from tests.conftest import image_folder


def model(replaced=()):
    made = create_teacher("DeiT-Micro", 10, 32).eval()
    swap_attention(made, replaced, "multi-lstm")
    return made


@pytest.mark.parametrize("replaced", [(), (1, 2)])
def test_integrated_gradients_are_complete_and_those_of_a_slow_loop(replaced):
    m, images = model(replaced).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
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


@pytest.mark.parametrize("replaced", [(), (0, 1, 2, 3)])
def test_importance_is_the_derivative_of_the_logit_as_the_token_is_scaled(replaced):
    m, images = model(replaced).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    maps, logits = token_importance(m, images, (1, 3))
    classes = logits.argmax(1)
    torch.testing.assert_close(logits, m(images))
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
    names = [*maps, *(f"{n}-blocks" for n in maps), "similarity-of-tokens", "influence"]
    made = sorted([f"{n}.png" for n in names] + [f"{n}.npz" for n in names] + ["index.html"])
    assert sorted(p.name for p in out.iterdir()) == made
    arrays = np.load(out / "influence.npz")
    assert arrays["FAR ‖∂z/∂x‖ block 2"].shape == (65, 65) and "attention weights block 2" in arrays
    blocks = np.load(out / "importance-0-blocks.npz")
    assert blocks["FAR block 2"].shape == blocks["teacher block 2"].shape == blocks["rollout"].shape == (8, 8)
    found = [np.load(out / f"{name}.npz") for name in maps]
    rho = signed(np.mean([spearmanr(m["FAR"].ravel(), m["teacher"].ravel()).statistic for m in found]))
    said = capsys.readouterr()
    assert f"importance: rank correlation of FAR with teacher, mean over the images: {rho}\n" in said.out
    assert str(out / "index.html") in said.out
    page = Links(out / "index.html")
    assert set(page.links) == {f"{n}.png" for n in names}
    assert "326,602" in page.text and "DIGITS, evaluation image 359, labelled “4”" in page.text
    assert f"mean over the imagesFAR{rho}" in page.text.replace("\n", "")


def test_every_model_is_asked_about_the_class_that_the_first_names(teacher, far, tmp_path):
    files = {"teacher": teacher, "FAR": far / "best.pth"}
    models, config, _ = find_models(PictureConfig(base_weight=files["teacher"], far_weight=files["FAR"]))
    images = find_images(PictureConfig(count=2), config)
    draw = Pictures(models, images, [0], tmp_path, "png", 0, torch.device("cpu"))
    draw.importance()
    x = images.read
    with torch.no_grad():
        named = models["teacher"](x).argmax(1, keepdim=True)
        for name, m in models.items():
            rises = (m(x) - m(x.mean((2, 3), keepdim=True).expand_as(x))).gather(1, named)[:, 0]
            sums = [np.load(tmp_path / f"importance-{k}.npz")[name].sum() for k in range(2)]
            np.testing.assert_allclose(sums, rises, rtol=0.02, atol=0.02)


def test_a_shown_map_is_its_patches_shares_smoothed_over_the_image(tmp_path):
    images = Images(torch.zeros(1, 3, 32, 32), np.zeros((1, 32, 32, 3)), ["none"], ())
    draw = Pictures({"FAR": model((1,))}, images, [1], tmp_path, "png", 0, torch.device("cpu"))
    patches = torch.zeros(8, 8)
    patches[2, 5], patches[6, 1] = 3.0, -1.0
    shown = draw._smooth(patches)
    assert shown.shape == (32, 32)
    for extreme, place, share in ((shown.argmax(), (2, 5), 75), (shown.argmin(), (6, 1), -25)):
        row, column = np.unravel_index(extreme, shown.shape)
        assert (row // 4, column // 4) == place and shown[row, column] == pytest.approx(share, rel=0.1)
    assert shown.sum() / 16 == pytest.approx(50, rel=0.05)  # a patch has 16 pixels
    assert np.abs(np.diff(shown, axis=0)).max() < 75 / 3  # no steps
    assert not draw._smooth(torch.zeros(8, 8)).any()


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


@pytest.mark.parametrize("models", [1, 3])
def test_importance_maps_share_one_scale_and_lie_over_the_image(models):
    rng = np.random.default_rng(0)
    maps = {f"model {k} says “7$_”": rng.normal(size=(56, 56)) * 10.0**-k for k in range(models)}
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


@pytest.mark.parametrize("blocks", [1, 4, 12, 24])
def test_block_maps_share_a_scale_a_row_and_use_the_page(blocks):
    rng = np.random.default_rng()
    rows = [
        Row(f"{name} says “7$_”", {i: rng.normal(size=(14, 14)) * 10.0**-k for i in range(blocks)}, True, "u", rho)
        for k, (name, rho) in enumerate({"teacher": {}, "FAR": dict.fromkeys(range(blocks), -0.004)}.items())
    ]
    figure = block_maps(rng.random((224, 224, 3)), "a cat", rows, "purple is for it")
    figure.draw_without_rendering()
    panels = [axes for axes in figure.findobj(Axes) if axes.get_title().startswith("block")]
    assert len(panels) == 2 * blocks
    said = texts(figure)
    assert "a cat" in said and "purple is for it" in said and "FAR says “7$_”" in said and "block 0, ρ 0.00" in said
    bars = [axes for axes in figure.findobj(Axes) if axes.get_ylabel() == "u"]
    assert len(bars) == 2 and bars[0].get_ylim()[1] > 5 * bars[1].get_ylim()[1]
    width, height = figure.get_size_inches()
    area = sum(np.prod(axes.get_window_extent().size) for axes in panels) / np.prod(figure.bbox.size)
    assert width < 20 and height < 2 * width and (area > 0.4 or blocks == 1)


def crossings(axes: Axes) -> list[tuple[str, str]]:
    """What covers what: texts beside points with one another and with points; a legend with the panel."""
    axes.figure.draw_without_rendering()
    notes = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in notes]
    found = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    found += [("legend", "panel") for legend in axes.figure.legends if legend.get_window_extent().overlaps(axes.bbox)]
    for line in axes.lines:
        points = axes.transData.transform(np.column_stack(line.get_data()))
        found += [(name, line.get_label()) for name, box in boxes if box.count_contains(points)]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_labels_and_legends_cover_no_point_and_no_label(seed):
    rng = np.random.default_rng(seed)
    keeps = [0.9, 0.7, 0.5, 0.3, 0.1]
    times, top1 = 1.2 + 0.3 * np.sort(rng.random(6)) ** 2, 100 - 4 * rng.random(8) ** 3  # crowded, as measured ones are
    rows = [
        {"name": f"FAR fused, keep {k}", "median_ms": t, "acc1": a} for k, t, a in zip(keeps, times, top1, strict=False)
    ]
    rows += [
        {"name": n, "median_ms": times[k], "acc1": top1[5 + k]} for k, n in enumerate(("FAR fused bfloat16", "DeiT"))
    ]
    figure = accuracy_by_latency(rows)
    assert crossings(figure.axes[0]) == []
    assert [t.get_text() for t in figure.axes[0].texts] == ["0.9", "0.7", "0.5", "0.3", "0.1"]
    points = [
        {"keep_ratio": k, "parameters": 2e5 + 1e5 * t, "acc1": a} for k, t, a in zip(keeps, times, top1, strict=False)
    ]
    row = {"parameters": 2.9e5, "acc1": 99.0}
    for teacher in (row, None):
        assert crossings(sweep_curve(points, {**row, "parameters": 3.2e5}, teacher).axes[0]) == []


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
    named = ["evaluation cross entropy", "training loss", "similarity", "classification"]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == named  # once each
    lines = [line for line in loss.lines if len(line.get_xdata()) and line.get_linestyle() in ("-", "--")]
    curves = [tuple(line.get_xdata()) for line in lines if len(set(line.get_ydata())) == 1]
    for begin, end in ((0, 3), (3, 5), (5, 6)):  # epochs go on from stage to stage
        assert curves.count(tuple(range(begin + 1, end + 1))) == 3 and curves.count(tuple(range(begin, end + 1))) == 1
    assert len(rate.lines) == 3 + 2 and rate.get_legend() is None
    assert [t.get_text() for t in accuracy.child_axes[0].get_xticklabels()] == ["attn", "block", "head"]
    for axes in figure.axes:
        assert not axes.get_legend() or not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_stage_names_do_not_collide():
    figure = training_curves(stage_rows({f"attn {k}/12": 1 for k in range(1, 13)}))
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [tick.get_window_extent() for tick in axes.child_axes[0].get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_cosine_axis_ends_at_one():
    values = {str(i): v for i, v in enumerate((-0.3, 0.999, 0.5))}
    figure = fidelity_by_block({"after": {"z_similarity": values, "output_error": values}})
    low, high = figure.axes[0].get_ylim()
    assert high == 1 and low < -0.3


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
