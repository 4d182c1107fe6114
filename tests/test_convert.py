"""Weights of the published code, both ways, against torch's own LSTM put together here by hand."""

import pytest
import timm
import torch
from torch import nn

import convert
from models.deit import create_teacher
from models.replace import FarConfig, build, describe, load_model, pack
from utils import checkpoint

UNITS = {"1": [[3, 32], [32, 1]], "3": [[1, 1], [20, 5]]}
PRUNED = FarConfig("DeiT-Micro", 5, 32, replaced=(0, 1, 3), units=UNITS, mlp={"1": 100, "2": 200})


class Dense(nn.Module):
    """The published layer: one LSTM of width D, head outputs joined by one projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.pre_proj, self.post_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.head_proj = nn.Linear(2 * dim, dim)

    def forward(self, x, **_):
        return self.post_proj(self.head_proj(self.lstm(self.pre_proj(x))[0]))


class PerHead(nn.Module):
    """Its deployment form: an LSTM a head, of `units` a direction."""

    def __init__(self, dim: int, units: list[int]):
        super().__init__()
        d = dim // len(units)
        self.pre_proj, self.post_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lstms = nn.ModuleList(nn.LSTM(d, u, batch_first=True, bidirectional=True) for u in units)
        self.head_projs = nn.ModuleList(nn.Linear(2 * u, d) for u in units)

    def forward(self, x, **_):
        parts = self.pre_proj(x).chunk(len(self.lstms), dim=2)
        heads = zip(parts, self.lstms, self.head_projs, strict=True)
        return self.post_proj(torch.cat([proj(lstm(part)[0]) for part, lstm, proj in heads], dim=2))


def masked(layer: Dense, heads: int) -> Dense:
    """Its weights zeroed off the heads' blocks, element by element."""
    dim = layer.pre_proj.in_features
    d = dim // heads
    rows, columns = torch.arange(4 * dim)[:, None], torch.arange(dim)[None]
    inside = (rows % dim) // d == columns // d
    joins = torch.arange(dim)[:, None] // d == (torch.arange(2 * dim)[None] % dim) // d
    with torch.no_grad():
        for name, weight in layer.lstm.named_parameters():
            nn.init.uniform_(weight, -0.3, 0.3)
            if name.startswith("weight"):
                weight *= inside
        layer.head_proj.weight *= joins
    return layer


def published(blocks=(0, 2, 3), layer=lambda: masked(Dense(64, 2), 2)) -> nn.Module:
    """A DeiT-Micro whose blocks hold such layers."""
    model = create_teacher("DeiT-Micro", 5, 32).eval()
    for i in blocks:
        model.blocks[i].attn = layer()
    return model


def write(path, content):
    torch.save(content, path)
    return path


def run(*argv) -> None:
    assert convert.main([str(word) for word in argv]) == 0


def assert_same_logits(a: nn.Module, b: nn.Module, size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(a.eval().double()(x), b.eval().double()(x), rtol=1e-9, atol=1e-9)


def test_a_published_deit_tiny_gives_the_same_logits_here(tmp_path):
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=9, img_size=64)
    for block in theirs.blocks[2:]:  # two keep their attention
        block.attn = masked(Dense(192, 3), 3)
    run("--published", write(tmp_path / "a.pth", theirs.state_dict()), "--output", tmp_path / "b.pth")
    ours, config = load_model(tmp_path / "b.pth")
    assert config == FarConfig("DeiT-Tiny", 9, 64, replaced=tuple(range(2, 12)))
    assert_same_logits(ours, theirs, 64)


@pytest.mark.parametrize(("per_head", "suffix"), [(False, ".pth"), (True, ".safetensors")])
def test_a_round_trip_is_bit_exact(per_head, suffix, tmp_path):
    layer = (lambda: PerHead(64, [32, 9])) if per_head else (lambda: masked(Dense(64, 2), 2))
    state = published(layer=layer).state_dict()
    run("--published", write(tmp_path / "a.pth", state), "--output", tmp_path / "b.pth")
    back = tmp_path / f"c{suffix}"
    run("--far-weight", tmp_path / "b.pth", "--output", back, *["--per-head"] * per_head)
    again = checkpoint.load(back)
    assert again.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in again.items())


@pytest.mark.parametrize("per_head", [False, True])
def test_a_pruned_model_goes_out_padded_and_comes_back_as_it_was(per_head, tmp_path):
    ours = build(PRUNED)
    checkpoint.save(tmp_path / "a.pth", pack(ours, PRUNED))
    run("--far-weight", tmp_path / "a.pth", "--output", tmp_path / "b.pth", *["--per-head"] * per_head)
    theirs = published(blocks=())
    for i in PRUNED.replaced:
        widths = [max(pair) for pair in UNITS.get(str(i), [[32, 32]] * 2)]
        theirs.blocks[i].attn = PerHead(64, widths) if per_head else Dense(64, 2)
    theirs.load_state_dict(torch.load(tmp_path / "b.pth"))
    assert_same_logits(ours, theirs, 32)

    run("--published", tmp_path / "b.pth", "--output", tmp_path / "c.pth", "--remove-zeroed")
    again, config = load_model(tmp_path / "c.pth")
    assert config == describe(ours, PRUNED) == PRUNED
    state = checkpoint.load(tmp_path / "a.pth")["model"]
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_units_that_a_mask_left_at_zero_are_counted_and_removed_on_request(tmp_path, capsys):
    theirs = published()
    all_four = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

    def zero(suffix, units, names=all_four):
        for name in names:
            getattr(theirs.blocks[2].attn.lstm, name + suffix).unflatten(0, (4, 64))[:, units] = 0

    with torch.no_grad():
        zero("", [0, 3, 40])  # two of head 0, one of head 1; what reads them is left
        zero("", 7, all_four[:2])  # its biases make a value
        zero("_reverse", slice(32, 64))  # a whole head: one unit stays
        theirs.blocks[1].mlp.fc1.weight[:5] = 0
        theirs.blocks[1].mlp.fc1.bias[:5] = 0
    path = write(tmp_path / "a.pth", theirs.state_dict())
    run("--published", path, "--output", tmp_path / "b.pth")
    assert "40 zeroed units kept" in capsys.readouterr().out and not load_model(tmp_path / "b.pth")[1].pruned
    run("--published", path, "--output", tmp_path / "c.pth", "--remove-zeroed")
    ours, config = load_model(tmp_path / "c.pth")
    assert config.units == {"2": [[30, 32], [31, 1]]} and config.mlp == {"1": 251}
    assert_same_logits(ours, theirs, 32)


def test_joined_heads_are_refused_by_size_and_place_and_read_as_one_head(failure, tmp_path, capsys):
    theirs = published()
    with torch.no_grad():
        theirs.blocks[3].attn.lstm.weight_hh_l0_reverse[64 + 5, 40] = -0.25  # gate 1, head 0, from head 1
        theirs.blocks[0].attn.head_proj.weight[40, 64] = 1e-7
    path = write(tmp_path / "a.pth", theirs.state_dict())
    words = ["--published", path, "--output", tmp_path / "b.pth"]
    line = failure(*words, script=convert.main)
    assert "blocks.3.attn.lstm.weight_hh_l0_reverse[69, 40] is 0.25" in line and not (tmp_path / "b.pth").exists()
    run(*words, "--rep-by", "lstm")
    assert_same_logits(load_model(tmp_path / "b.pth")[0], theirs, 32)
    capsys.readouterr()
    run(*words, "--tolerance", "0.25")
    assert "values up to 0.25 off the heads' blocks dropped" in capsys.readouterr().out
    with torch.no_grad():
        theirs.blocks[3].attn.lstm.weight_hh_l0_reverse[69, 40] = theirs.blocks[0].attn.head_proj.weight[40, 64] = 0
    assert_same_logits(load_model(tmp_path / "b.pth")[0], theirs, 32)


STATE = published().state_dict()
CONVERT, BACK = "--published a.pth --output b.pth", "--far-weight a.pth --output b.pth"


LACKING = "blocks.0.attn.lstm.bias_hh_l0_reverse"


def micro(*replacement):
    return pack(build(config := FarConfig("DeiT-Micro", 5, 32, *replacement)), config)


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (STATE, "--published a.pth --output b.safetensors", "unknown suffix"),
        (STATE, "--published a.pth --output a.pth", "a.pth: would take the place of the weights"),
        (STATE, f"{CONVERT} --per-head", "--per-head: --published does not use it"),
        (STATE, f"{CONVERT} --scale Tiny", "width 64, 4 blocks and patches of 4 px, which is no"),
        ({k: v for k, v in STATE.items() if k != LACKING}, CONVERT, f"lacks {LACKING}"),
        (published(layer=lambda: PerHead(64, [33, 1])).state_dict(), CONVERT, "units must be"),
        (create_teacher("DeiT-Micro", 5, 32).state_dict(), CONVERT, "no block of it is replaced"),
        (micro("multi-lstm", (1,)), CONVERT, "is a FAR checkpoint already"),
        (micro("gru", (1,)), BACK, "by LSTMs alone"),
        (micro(), BACK, "holds a teacher"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(content, words, message, mistake, tmp_path):
    write(tmp_path / "a.pth", content)
    mistake(words, message, script=convert.main)
