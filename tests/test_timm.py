"""FAR models as timm and torch.hub know models; another image size than the trained one."""

import sys
from types import ModuleType

import pytest
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import create_model, is_model, list_models
from timm.models._features import FeatureGetterNet

import main
import models.timm_models  # noqa: F401  (registers)
from models.deit import create_teacher
from models.replace import FarConfig, build, describe, load_model, pack, replacements
from tests.conftest import BLOCK_BATCH, DIGITS, EVAL, ROOT, launch
from utils import checkpoint
from utils.errors import FarError

NAME = "far_deit_tiny_patch16_224"
RAGGED = {"1": [[3, 64], [64, 1], [20, 20]], "4": [[1, 1], [2, 5], [64, 64]]}
TINY = FarConfig("DeiT-Tiny", 7, 64, replaced=(1, 4, 5), units=RAGGED, mlp={"2": 100})
FILES = {
    "ragged": TINY,
    "gru": FarConfig("DeiT-Tiny", 7, 64, "gru", (0, 3), {"3": [[2, 3], [64, 64], [1, 9]]}),
    "mingru": FarConfig("DeiT-Tiny", 7, 64, "mingru", (0, 3), {"3": [[2, 3], [64, 64], [1, 9]]}),
    "mixer": FarConfig("DeiT-Tiny", 7, 64, "mixer", (2,)),
    "micro": FarConfig("DeiT-Micro", 10, 32, replaced=(0, 3)),
    "micro-mixer": FarConfig("DeiT-Micro", 10, 32, "mixer", (1,)),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """FAR checkpoints of fresh weights, by name."""
    folder = tmp_path_factory.mktemp("far")
    for name, config in FILES.items():
        model = build(config)
        for part in replacements(model).values():  # biases too
            for parameter in part.parameters():
                torch.nn.init.uniform_(parameter, -0.3, 0.3)
        checkpoint.save(folder / f"{name}.pth", pack(model, config))
    return folder


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


@torch.no_grad()
def assert_same(a, b, size: int, what="forward") -> None:
    x = images(size)
    assert torch.equal(getattr(a.eval(), what)(x), getattr(b.eval(), what)(x))


def test_three_scales_are_registered_with_their_data_configuration():
    assert list_models("far_deit*") == [f"far_deit_{scale}_patch16_224" for scale in ("base", "small", "tiny")]
    model = create_model(NAME, num_classes=3)
    assert list(replacements(model)) == list(range(12)) and model(images(224)).shape == (2, 3)
    data = resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
    assert is_model("far_deit_base_patch16_224") and create_model("far_deit_small_patch16_224").embed_dim == 384


@pytest.mark.parametrize("name", ["ragged", "gru", "mingru", "mixer"])
def test_a_checkpoint_shapes_the_model_that_timm_makes(name, files):
    path = files / f"{name}.pth"
    model, (expected, config) = create_model(NAME, checkpoint_path=path), load_model(path)
    assert_same(model, expected, 64)
    assert describe(model, config) == config
    assert model.num_classes == 7 and resolve_model_data_config(model)["input_size"] == (3, 64, 64)


def test_classes_and_size_that_are_asked_for_are_had(files, caplog):
    path, x = files / "ragged.pth", images(96)
    model, (expected, _) = create_model(NAME, checkpoint_path=path, num_classes=4, img_size=96), load_model(path)
    assert "knows 7 classes, not 4" in caplog.text and model(x).shape == (2, 4)
    expected.set_input_size(96)
    assert_same(model, expected, 96, "forward_features")
    model.load_state_dict(model.state_dict())  # from now on as torch loads
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(checkpoint.load(path)["model"])


def test_a_checkpoint_that_does_not_fit_says_so(files):
    with pytest.raises(FarError, match="holds a DeiT-Tiny"):
        create_model("far_deit_small_patch16_224", checkpoint_path=files / "ragged.pth")
    with pytest.raises(FarError, match="a mixer works on its own 17 tokens, not on 37"):
        create_model(NAME, checkpoint_path=files / "mixer.pth", img_size=96)


@torch.no_grad()
def test_features_are_what_the_blocks_give(files):
    model, x = load_model(files / "ragged.pth")[0], images(64)
    states = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: states.append(output))
    logits, states = model(x), list(states)
    last, inner = model.forward_intermediates(x, [1, 4], return_prefix_tokens=True, output_fmt="NLC")
    assert torch.equal(last, model.norm(states[-1]))
    for (patches, prefix), i in zip(inner, (1, 4), strict=True):
        assert torch.equal(torch.cat([prefix, patches], 1), states[i])
    got = model.get_intermediate_layers(x, [4, 11], reshape=True, norm=True)
    for grid, i in zip(got, (4, 11), strict=True):
        assert torch.equal(grid.flatten(2).transpose(1, 2), model.norm(states[i])[:, 1:])
    assert torch.equal(logits, model.head(last[:, 0])) and torch.equal(last, model.forward_features(x))
    model.reset_classifier(3)
    assert torch.equal(model(x), model.head(last[:, 0])) and model(x).shape == (2, 3)


@torch.no_grad()
def test_timm_takes_the_features_of_a_checkpoint(files):
    """What features_only=True wraps a model in; with checkpoint_path that fails in timm, for its own models too."""
    model, x = create_model(NAME, checkpoint_path=files / "ragged.pth").eval(), images(64)
    expected = model.forward_intermediates(x, [1, 11], norm=False, intermediates_only=True)
    for got, want in zip(FeatureGetterNet(model, out_indices=[1, 11])(x), expected, strict=True):
        assert torch.equal(got, want)
    assert [f.shape for f in create_model(NAME, features_only=True, img_size=64)(images(64))] == [(2, 192, 4, 4)] * 3


def test_another_input_size_resizes_positions_and_travels_with_the_checkpoint(files, tmp_path):
    model, config = load_model(files / "ragged.pth")
    before = model.pos_embed.clone()
    model.set_input_size(96)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(before, [6, 6])) and model(images(96)).shape == (2, 7)
    checkpoint.save(tmp_path / "a.pth", pack(model, config))
    again, found = load_model(tmp_path / "a.pth")
    assert found.img_size == 96
    assert_same(again, model, 96)


def test_main_evaluates_at_another_input_size_where_the_replacement_can(files, failure, capsys):
    words = ["--mode", "eval", *EVAL, "--far-weight"]
    assert main.main([*words, str(files / "micro.pth"), "--input-size", "24"]) == 0
    assert "on 360 images" in capsys.readouterr().out
    line = failure(*words, files / "micro-mixer.pth", "--input-size", "24")
    assert "--input-size 24: --far-weight" in line and "a mixer works on its own 65 tokens, not on 37" in line
    line = failure(*words, files / "micro.pth", "--input-size", "26")
    assert "--input-size 26: DeiT-Micro needs a multiple" in line


def test_what_goes_on_at_another_input_size_is_saved_at_it(files, tmp_path):
    torch.save(create_teacher("DeiT-Micro", 10, 32).state_dict(), tmp_path / "t.pth")
    words = ["--attn-weight", str(files / "micro.pth"), "--base-weight", str(tmp_path / "t.pth"), "--input-size", "24"]
    flags = ["--mode", "block-distill", *DIGITS, *BLOCK_BATCH, "--block-ft-epochs", "1", "--replace", "0,3"]
    assert main.main([*flags, *words, "--output-dir", str(tmp_path / "run")]) == 0
    assert load_model(tmp_path / "run/best.pth")[1].img_size == 24


HUB = f"""
import torch
model = torch.hub.load({str(ROOT)!r}, "far", source="local", checkpoint="far.pth", input_size=96, num_classes=3)
assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
import timm
assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 96, 96)
"""


def test_torch_hub_loads_from_any_folder(files, tmp_path):
    (tmp_path / "utils.py").write_text("")  # not imported before: the suite's is found first
    (tmp_path / "far.pth").symlink_to(files / "ragged.pth")
    done = launch("-c", HUB, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_torch_hub_names_another_package_in_the_place_of_the_suites(files, tmp_path, monkeypatch):
    other = ModuleType("utils")
    other.__file__ = str(tmp_path / "utils.py")
    monkeypatch.setitem(sys.modules, "utils", other)
    with pytest.raises(ImportError, match=r"another `utils` is already imported \(.*utils\.py\)"):
        torch.hub.load(str(ROOT), "far", source="local", checkpoint=files / "ragged.pth")
