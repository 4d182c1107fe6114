"""Any VisionTransformer of timm's, by name, from --base-model to a pruned checkpoint; what cannot be is one line."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import main
import prune
from deploy.fuse import fuse
from deploy.onnx_graph import find_faults, to_onnx
from deploy.packed import why_not
from engine import modes
from engine.distill import Distillation
from engine.hoyer import unit_norms
from engine.shrink import keep_share, shrink
from engine.stages import Stage, select_trainable
from models.deit import TEACHERS, create_teacher
from models.kernels import cpu
from models.replace import FarConfig, describe, load_model, mlps, pack, replacements, reset_classifier, swap_attention
from models.vit import Teacher, classifiers, timm_teacher
from models.weights import load_teacher_weights, read
from tests.conftest import QUIET, randomize
from utils.checkpoint import load, save
from utils.configs import Optim
from utils.errors import FarError

CLASSES = 7
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}  # of timm's architectures, the rest as timm has it
OURS = {  # kinds that timm has under no name
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "gated MLPs": {"mlp_layer": GluMlp, "mlp_ratio": 8 / 3},
}
KINDS = {  # image side; prefix tokens; whether MLPs can be pruned, and whether one operator computes it
    "deit_tiny_distilled_patch16_224": (32, 2, True, False),
    "deit3_small_patch16_224": (32, 1, True, True),  # LayerScale, positions of patches alone
    "vit_small_patch14_reg4_dinov2": (28, 5, True, True),  # registers too
    "vit_small_patch32_224.augreg_in21k": (64, 1, True, True),  # a plain one, with a tag of its weights
    "vit_wee_patch16_reg1_gap_256": (32, 1, True, False),  # average pooling
    "vit_xsmall_patch16_clip_224": (32, 1, True, False),  # a norm before the blocks
    "test_vit3": (32, 1, True, False),  # attention pooling
    "test_vit4": (32, 1, True, False),  # RmsNorm
    "norms": (16, 1, False, False),
    "no biases": (16, 1, False, True),
    "gated MLPs": (16, 1, False, False),
}
DISTILLED = "deit_tiny_distilled_patch16_224"


@pytest.fixture(scope="module", autouse=True)
def small():
    """The KINDS, small, as teachers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in KINDS:
            if name in OURS:
                build = partial(VisionTransformer, patch_size=8, **SMALL, **OURS[name])
                teacher = Teacher(build, 16, 8, published=False, architecture=name)
            else:
                teacher = timm_teacher(name)._replace(build=partial(timm.create_model, name, **SMALL))
            patch.setitem(TEACHERS, name, teacher)
        yield


def student_of(name: str) -> tuple[VisionTransformer, VisionTransformer, FarConfig]:
    size = KINDS[name][0]
    teacher = randomize(create_teacher(name, CLASSES, size))
    student = copy.deepcopy(teacher)
    swap_attention(student, (0, 2), "multi-lstm")
    return teacher, student, describe(student, FarConfig(name, CLASSES, size))


@torch.no_grad()
def logits(model, size: int) -> torch.Tensor:
    return model(torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_is_replaced_distilled_pruned_and_read_back(name, tmp_path):
    teacher, student, config = student_of(name)
    size, prefix, prunable, _ = KINDS[name]
    tokens = (size // teacher.patch_embed.patch_size[0]) ** 2 + prefix
    for i, part in replacements(student).items():
        proj = teacher.blocks[i].attn.proj
        assert part.num_tokens == tokens and torch.equal(part.post_proj.weight, proj.weight)
        assert torch.equal(part.post_proj.bias, torch.zeros(48) if proj.bias is None else proj.bias)

    stage = Stage("attn", config.replaced, config.replaced, "full", "preserve", "z", Optim(1, 1, 1e-3))
    select_trainable(student, stage)
    distillation = Distillation(student, stage, nn.CrossEntropyLoss(), teacher).train()
    loss, parts = distillation(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
    loss.backward()
    assert parts["similarity"] > 0 and parts["squared_error"] > 0 and parts["kl"] > -1e-6  # rounded
    idle = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(any(part in name for part in ("attn_pool", "k_norm", "q_norm")) for name in idle), idle

    for parts in (replacements(student), mlps(student)):
        if parts:
            shrink(parts, keep_share(unit_norms(parts), 0.4))
    save(tmp_path / "far.pth", pack(student.eval(), config))
    again, found = load_model(tmp_path / "far.pth")
    assert found == describe(student, config) and found.units and bool(found.mlp) == prunable
    assert torch.equal(logits(again, size), logits(student, size))


@pytest.mark.parametrize("name", KINDS)
def test_for_inference_it_computes_what_it_computed(name, caplog):
    _, model, _ = student_of(name)
    size, _, _, covered = KINDS[name]
    expected = logits(model, size)
    if cpu.available():
        assert (why_not(model) == "") == covered
        torch.testing.assert_close(logits(fuse(model), size), expected, rtol=1e-4, atol=1e-4)
        assert len(caplog.records) == (not covered)  # one line where it is merged block by block
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    assert (find_faults(model) == "") == covered
    if not covered:
        with pytest.raises(FarError, match="--to onnx: .* use --to pt2 or safetensors"):
            to_onnx(model, 20, {})
        return
    session = runtime.InferenceSession(to_onnx(model, 20, {}).SerializeToString())
    got = logits(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), size)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in OURS])
def test_its_own_weights_go_to_another_size_and_class_count(name, tmp_path):
    """As timm writes them, and DeiT-III's authors; with a fresh classifier where there are other classes."""
    size = KINDS[name][0]
    theirs = randomize(timm.create_model(name, num_classes=CLASSES, img_size=size, **SMALL)).requires_grad_()
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in theirs.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "a.pth")
    weights, larger = read(tmp_path / "a.pth"), size + theirs.patch_embed.patch_size[0]
    model = create_teacher(name, CLASSES, larger).eval()
    load_teacher_weights(model, weights)
    theirs.set_input_size(larger)
    assert torch.equal(logits(model, larger), logits(theirs, larger))
    other = create_teacher(name, CLASSES + 1, size).eval()
    with pytest.raises(FarError, match=f"has {CLASSES} classes"):
        load_teacher_weights(other, weights)
    load_teacher_weights(other, weights, keep_head=False)
    reset_classifier(other, CLASSES + 2)
    assert not any(head.bias.any() for head in classifiers(other))  # fresh, both of a distilled one
    assert logits(other, size).shape == (3, CLASSES + 2) and logits(other, size).abs().max() > 0


def test_gated_mlps_cannot_be_pruned_and_say_so(failure, tmp_path):
    _, student, config = student_of("gated MLPs")
    save(tmp_path / "a.pth", pack(student, config))
    data = ["--dataset", "DIGITS", "--num-workers", "0"]
    line = failure("--model-path", tmp_path / "a.pth", "--prune-mlp", *data, script=prune.main)
    assert "--prune-mlp: a gated MLPs has GluMlp" in line


# ---- commands

ONE = "--dataset DIGITS --holdout 0.02 --train-subset 0.03 --epochs 1 --batch-size 16".split() + QUIET


def test_a_distilled_deit_keeps_both_its_tokens_and_classifiers(tmp_path):
    """Trained for an epoch at 32 px by name, replaced by its file alone, and pruned."""
    teacher, far, pruned = (tmp_path / name for name in ("teacher", "far", "pruned"))
    words = ["--mode", "teacher", "--base-model", DISTILLED, "--input-size", "32", *ONE]
    assert main.main([*words, "--output-dir", str(teacher)]) == 0
    weight = ["--base-weight", str(teacher / "best.pth")]
    block = "--block-ft-batch-size 16 --block-ft-epochs 1 --block-ft-mode FC+head --finetune-head".split()
    words = ["--mode", "train", *weight, "--replace", "0,2", *ONE, *block]
    assert main.main([*words, "--output-dir", str(far)]) == 0
    words = ["--model-path", str(far / "best.pth"), *weight, "--keep-ratio", "0.5", "--prune-mlp", "0.5", *ONE]
    words += ["--ft-epochs", "1", "--ft-batch-size", "16"]
    assert prune.main([*words, "--output-dir", str(pruned)]) == 0
    before, after = (load(run / "best.pth")["model"] for run in (teacher, far))
    for name in ("head", "head_dist"):
        assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])  # both trained
    x = torch.randn(2, 3, 32, 32)
    for run in (far, pruned):
        model, config = load_model(run / "best.pth")
        with torch.no_grad():
            tokens = model.forward_features(x)
            torch.testing.assert_close(model(x), (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2)
        assert (config.base_model, config.img_size, model.pos_embed.shape[1]) == (DISTILLED, 32, 6)
    assert config.pruned and set(config.units) == {"0", "2"} and len(config.mlp) == 3


@pytest.mark.parametrize(
    ("words", "mean", "std", "crop", "mode"),
    [
        ("--base-model test_vit --input-size 48", (0.5,) * 3, (0.5,) * 3, 0.95, "center"),  # timm's
        ("--base-model DeiT-Tiny --input-size 48", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, "center"),
        ("--base-model test_vit --input-size 32 --mean 0.1 0.2 0.3", (0.1, 0.2, 0.3), (0.5,) * 3, 1.0, "squash"),
        ("--base-weight TEACHER --input-size 32", (0.1, 0.1, 0.1), (0.3, 0.3, 0.3), 1.0, "squash"),  # the file's
    ],
)
def test_images_are_prepared_as_the_teacher_expects_them(words, mean, std, crop, mode, tmp_path, monkeypatch):
    content = pack(create_teacher("DeiT-Micro", 10, 32), FarConfig("DeiT-Micro", 10, 32))
    content["config"]["preprocessing"] = {"mean": (0.1,) * 3, "std": (0.3,) * 3}
    save(tmp_path / "t.pth", content)
    calls = []
    monkeypatch.setattr(modes, "train_and_report", lambda *args: calls.append((args[3].preprocessing, args[6])))
    words = words.replace("TEACHER", str(tmp_path / "t.pth")).split()
    assert main.main(["--mode", "teacher", *words, *ONE]) == 0
    ((found, data),) = calls
    assert (found.mean, found.std, found.crop_pct, found.crop_mode) == (mean, std, crop, mode)
    assert found == data.preprocessing
    assert data.train.transform.transforms[-1].mean.flatten().tolist() == pytest.approx(mean)
