"""The whole model as one operator: logits are the unfused float64 model's for any model, batch and build."""

import copy
import io

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deploy.fuse import fuse
from deploy.packed import PackedModel, why_not
from models.kernels import cpu
from models.replace import FarConfig, build, swap_attention
from tests.conftest import randomize
from tests.test_kernels import BUILDS
from utils.errors import FarError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
needs_bfloat16 = pytest.mark.skipif(not cpu.has_bfloat16(), reason="no AVX512_BF16 here")
RAGGED = {"1": [[5, 32], [1, 7]]}


def vit(
    dim: int, heads: int, replaced=(0, 1), units=None, rep_by="multi-lstm", size=32, patch=8, depth: int = 2, **kwargs
):
    """A short vision transformer of any width."""
    shape = {"img_size": size, "patch_size": patch, "embed_dim": dim, "num_heads": heads, "depth": depth}
    model = VisionTransformer(**shape, **{"num_classes": 10, **kwargs})
    swap_attention(model, replaced, rep_by, units=units)
    return randomize(model)


def micro(replaced=(0, 1, 3), **kwargs):
    return randomize(build(FarConfig("DeiT-Micro", 10, 32, replaced=replaced, **{"units": RAGGED, **kwargs})))


def prune_mlps(model: VisionTransformer, *widths: int) -> VisionTransformer:
    for block, width in zip(model.blocks, widths, strict=False):
        dim = model.embed_dim
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(dim, width), nn.Linear(width, dim)
    return randomize(model)


def relative_error(model: VisionTransformer, got: torch.Tensor, images: torch.Tensor) -> float:
    """Against the unfused model in float64."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double())
    return ((got - expected).norm() / expected.norm()).item()


def images_for(model: VisionTransformer, batch: int) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


MODELS = {
    "ragged": micro,
    "plain": lambda: micro((), units={}),
    "tiny": lambda: vit(192, 3, units={"0": [[64, 1], [17, 40], [3, 64]], "1": [[16, 16]] * 3}),
    "base unpruned": lambda: vit(768, 12, replaced=(0,), depth=1),
    "few units, pruned MLPs": lambda: prune_mlps(vit(192, 3, units={"0": [[2, 1]] * 3, "1": [[1, 3]] * 3}), 1000, 1),
    "odd width": lambda: vit(60, 3, replaced=(0,), units={"0": [[20, 7], [3, 1], [19, 20]]}),
    "one head": lambda: vit(72, 1, replaced=(1,)),
    "one block of attention": lambda: vit(64, 2, replaced=(), depth=1),
    "oblong": lambda: vit(64, 2, size=(24, 40), patch=(8, 4), num_classes=3, in_chans=1),
    "registers": lambda: vit(64, 2, reg_tokens=4, no_embed_class=True, qkv_bias=True, class_token=True),
    "layer scale": lambda: vit(64, 2, replaced=(0,), init_values=0.1, reg_tokens=2),
    "many tokens": lambda: vit(64, 2, replaced=(0,), size=64, patch=4),
    "heads apart": lambda: vit(256, 16, (0,), {"0": [[16, 7], [13, 16]] * 8}, depth=1),
    "mingru": lambda: vit(192, 3, rep_by="mingru"),
    "ragged mingru": lambda: micro(rep_by="mingru"),
    "few units of mingru": lambda: vit(192, 3, rep_by="mingru", units={"0": [[2, 1]] * 3, "1": [[1, 3]] * 3}),
    "odd width of mingru": lambda: vit(60, 3, (0,), {"0": [[20, 7], [3, 1], [19, 20]]}, "mingru", reg_tokens=0),
    "many tokens of mingru": lambda: vit(64, 2, (1,), rep_by="mingru", size=64, patch=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_unfused_models_in_every_batch_on_any_number_of_threads(name):
    model = MODELS[name]()
    engine = PackedModel(model)
    for threads, batch in ((1, 1), (1, 7), (2, 1), (2, 3), (3, 13)):
        torch.set_num_threads(threads)
        images = images_for(model, batch)
        assert relative_error(model, engine(images), images) < 1e-5


@pytest.mark.parametrize("build", BUILDS)
def test_every_build_gives_the_same(build, monkeypatch):
    operators = cpu.load(BUILDS[build])
    monkeypatch.setattr(cpu, "load", lambda flags: operators)
    for model in (micro(), micro(rep_by="mingru"), vit(192, 3, (0,), {"0": [[64, 1], [17, 40], [3, 64]]})):
        engine, images = PackedModel(model), images_for(model, 3)
        got = operators.model(images, engine.plan, engine.vectors, engine.products, engine.num_classes)
        assert relative_error(model, got, images) < 1e-5
        for precision in [torch.int8, *[torch.bfloat16][: operators.has_bfloat16()]]:
            engine = PackedModel(model, precision)
            got = operators.model(images, engine.plan, engine.vectors, engine.products, engine.num_classes)
            assert relative_error(model, got, images) < 0.02


@pytest.mark.parametrize("tokens", [2, 47, 48, 49, 96, 97])
def test_a_scan_of_any_number_of_tokens_is_whole(tokens):
    """Gates are made for 48 tokens at once."""
    model = vit(64, 2, rep_by="mingru", size=(8, 8 * (tokens - 1)))
    images = images_for(model, 2)
    assert relative_error(model, PackedModel(model)(images), images) < 1e-5


@needs_bfloat16
@pytest.mark.parametrize("tokens", [2, 3, 15, 16, 17, 31, 32, 33, 34])
def test_bfloat16_products_of_any_number_of_rows(tokens):
    units = {"0": [[20, 7], [3, 1], [33, 20]]}
    model = vit(60, 3, replaced=(0,), units=units, size=(8, 8 * (tokens - 1)), reg_tokens=0)
    for batch in (1, 3):
        images = images_for(model, batch)
        assert relative_error(model, PackedModel(model, torch.bfloat16)(images), images) < 0.02


@needs_bfloat16
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_rounds_products_and_nothing_else(name):
    model = MODELS[name]()
    images = images_for(model, 16)
    got = PackedModel(model, torch.bfloat16)(images)
    with torch.no_grad():
        expected = model(images)
    assert relative_error(model, got, images) < 0.02
    top, second = expected.topk(2).values.T
    clear = top - second > 0.1 * expected.std()
    assert torch.equal(got.argmax(1)[clear], expected.argmax(1)[clear])


def test_images_of_any_layout_and_type_are_read_right():
    model = micro()
    engine, images = PackedModel(model), images_for(model, 3)
    expected = engine(images)
    wide = torch.randn(3, 4, 40, 70)
    wide[:, :3, 2:34, 3:67:2] = images
    for same in (images.to(memory_format=torch.channels_last), wide[:, :3, 2:34, 3:67:2], images.double()):
        assert torch.equal(engine(same), expected)
    assert engine(images[:0]).shape == (0, 10)
    assert torch.equal(engine(images.bfloat16()), engine(images.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.to(memory_format=torch.channels_last)(images), expected)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda engine, x: engine(torch.zeros(1, 3, 64, 64)), r"reads images \(B, 3, 32, 32\)"),
        (lambda engine, x: engine(x.byte()), "uint8"),
        (lambda engine, x: engine(x.to("meta")), "meta"),
        (lambda engine, x: engine(x.to_sparse()), "dense tensors"),
        (lambda engine, x: engine(x.requires_grad_()), "no gradients"),
        (lambda engine, x: torch.func.jvp(engine, (x,), (x,)), "no gradients"),
        (lambda engine, x: engine.forward_features(x), "logits alone"),
        (lambda engine, x: engine.load_state_dict(engine.state_dict()), "load_state_dict"),
        (lambda engine, x: engine.to(torch.float64), "move it first"),
        (lambda engine, x: engine.to("meta"), "move it first"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line_and_changes_nothing(call, said):
    engine, images = PackedModel(micro()), torch.randn(1, 3, 32, 32)
    expected = engine(images)
    with pytest.raises(FarError, match=said):
        call(engine, images.clone())
    assert torch.equal(engine.float().cpu()(images), expected)


@pytest.mark.parametrize(
    ("replaced", "rep_by"), [((), "multi-lstm"), ((0, 1, 2, 3), "multi-lstm"), ((0, 1, 2, 3), "mingru")]
)
@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16), torch.int8])
def test_nan_and_infinity_pass_through_and_stay_in_their_image(replaced, rep_by, precision):
    model = micro(replaced, units={}, rep_by=rep_by)
    engine, images = PackedModel(model, precision), images_for(model, 3)
    expected = engine(images)
    for bad in (float("nan"), float("inf")):
        broken = images.clone()
        broken[1, 2, 3, 4] = bad
        got = engine(broken)
        assert got[1].isnan().all() and torch.equal(got[[0, 2]], expected[[0, 2]])
        assert torch.equal(engine(images), expected)  # and nothing of it stays


def test_attention_far_beyond_what_exp_can_hold_is_right():
    model = micro((), units={})
    for block in model.blocks:
        block.attn.qkv.weight[:128] *= 40  # scores of some hundreds
    images = images_for(model, 2)
    assert relative_error(model, PackedModel(model)(images), images) < 1e-3


def test_models_share_scratch_memory_without_a_trace():
    """Large and small models in turn, each after one that left NaNs behind."""
    names = ("tiny", "ragged", "odd width", "many tokens", "odd width of mingru", "mingru")
    engines = [PackedModel(MODELS[name]()) for name in names]
    pairs = [(engine, torch.randn(2, *engine.shape)) for engine in engines]
    expected = [engine(images) for engine, images in pairs]
    for (engine, images), logits in zip(pairs, expected, strict=True):
        for other, others_images in pairs:
            other(others_images * float("nan"))
        assert torch.equal(engine(images), logits)


def test_a_packed_model_can_be_copied_and_pickled():
    engine, images, buffer = PackedModel(micro()), torch.randn(2, 3, 32, 32), io.BytesIO()
    torch.save(engine, buffer)
    buffer.seek(0)
    expected = engine(images)
    for again in (copy.deepcopy(engine), torch.load(buffer, weights_only=False)):
        assert torch.equal(again(images), expected)


def test_a_model_packed_for_another_cpu_is_refused_and_not_misread():
    engine, images = PackedModel(micro()), torch.randn(1, 3, 32, 32)
    engine.plan[1] = 4
    with pytest.raises(RuntimeError, match="another kind of CPU"):
        engine(images)
    engine = PackedModel(micro(), torch.int8)  # in 8 bits or in 16, by the CPU
    other = torch.int16 if engine.products.dtype == torch.int8 else torch.int8
    engine.products = nn.Parameter(engine.products.to(other), requires_grad=False)
    with pytest.raises(RuntimeError, match="another kind of CPU"):
        engine(images)


@pytest.mark.parametrize("scale", [1e-2, 1e-6])
def test_small_states_keep_their_digits(scale):
    """Cells whose candidates are tiny, read by a head projection as much larger: the same function, nearly."""
    model = vit(64, 2)
    for block in model.blocks:
        for head, proj in zip(block.attn.lstm, block.attn.head_proj, strict=True):
            proj.weight.div_(scale)
            for direction in head:
                for weight in direction.parameters():
                    direction.by_gate(weight)[2] *= scale
    images = images_for(model, 2)
    assert relative_error(model, PackedModel(model)(images), images) < 1e-5


class Adapted(nn.Linear):
    """As adapters are: a linear map that computes more than its weight says."""

    def forward(self, x):
        return super().forward(x) + 1


def adapted(*path: str) -> VisionTransformer:
    model = micro()
    part = model.get_submodule(".".join(path[:-1]))
    old = getattr(part, path[-1])
    setattr(part, path[-1], Adapted(old.in_features, old.out_features))
    return model


def hooked() -> VisionTransformer:
    model = micro()
    model.blocks[-1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def distilled() -> VisionTransformer:
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=10).eval()


REFUSED = {
    "two class tokens": distilled,
    "a hook": hooked,
    "an adapter on the classifier": lambda: adapted("head"),
    "an adapter on an MLP": lambda: adapted("blocks", "1", "mlp", "fc2"),
    "an adapter on attention": lambda: adapted("blocks", "2", "attn", "qkv"),
    "an adapter on a replacement": lambda: adapted("blocks", "3", "attn", "pre_proj"),
    "GRU": lambda: build(FarConfig("DeiT-Micro", 10, 32, rep_by="gru", replaced=(0,))),
    "token mixer": lambda: build(FarConfig("DeiT-Micro", 10, 32, rep_by="mixer", replaced=(0,))),
    "float64": lambda: micro().double(),
    "average pooling": lambda: vit(64, 2, global_pool="avg", class_token=False),
    "norm before the blocks": lambda: vit(64, 2, pre_norm=True),
    "norm of queries": lambda: vit(64, 2, replaced=(), qk_norm=True),
    "another norm": lambda: vit(64, 2, norm_layer="rmsnorm"),
    "another activation": lambda: vit(64, 2, act_layer="relu"),
    "images of any size": lambda: vit(64, 2, dynamic_img_size=True),
    "no positions": lambda: vit(64, 2, pos_embed="none"),
    "no transformer": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_does_not_cover_is_refused_with_a_reason(name):
    model = REFUSED[name]()
    assert (reason := why_not(model))
    with pytest.raises(FarError) as caught:
        PackedModel(model)
    assert reason in str(caught.value)
    if isinstance(model, VisionTransformer):  # merged block by block, they compute what they computed
        images = torch.randn(2, 3, 32, 32, dtype=next(model.parameters()).dtype)
        with torch.no_grad():
            torch.testing.assert_close(fuse(model)(images), model(images), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(FarError, match="give it the model alone"):
            fuse(model)


def test_it_compiles_and_exports_as_one_graph():
    engine, images = PackedModel(micro()), torch.randn(2, 3, 32, 32)
    expected = engine(images)
    torch.library.opcheck(
        torch.ops.far.model.default, (images, engine.plan, engine.vectors, engine.products, engine.num_classes)
    )
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), expected)
    exported = torch.export.export(engine, (images,)).module()
    assert torch.equal(exported(images), expected)
