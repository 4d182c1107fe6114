"""What stands in attention's place: the multi-head bidirectional LSTM, and a token mixer (arXiv 2505.21535)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models import kernels


class Replacement(nn.Module):
    """Base of everything that replaces an attention block: `forward(x) = post_proj(mix(x))`.

    Args:
        dim: embedding width D.
        num_heads: heads H.
        num_tokens: tokens N (only token mixers are tied to it).
        units: kept units u[h][r] per head and direction; None is D / H everywhere.

    Shapes: x (B, N, D); `mix` gives z (B, N, D), the counterpart of attention's joined head outputs; forward (B, N, D).
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__()
        self.dim, self.num_heads, self.num_tokens = dim, num_heads, num_tokens
        self.post_proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mixing_parts(self) -> list[nn.Module]:
        """What stage attn trains: every child but post_proj."""
        return [child for child in self.children() if child is not self.post_proj]

    def init_from_attention(self, attn: nn.Module, init: str) -> None:
        """post_proj becomes a copy of the teacher's output projection, so that z keeps the teacher's meaning."""
        self.post_proj.load_state_dict(attn.proj.state_dict())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The last two arguments are timm's block protocol; a bidirectional replacement reads every token."""
        if attn_mask is not None or is_causal:
            raise ValueError("FAR's replacements are bidirectional and take no mask")
        return self.post_proj(self.mix(x))


class DirectionLSTM(nn.Module):
    """Weights of one head's LSTM in one direction, named and shaped as in `nn.LSTM`: u units reading d channels."""

    def __init__(self, input_size: int, units: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * units, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * units, units))
        self.bias_ih = nn.Parameter(torch.zeros(4 * units))
        self.bias_hh = nn.Parameter(torch.zeros(4 * units))
        self.reset_parameters()

    @property
    def units(self) -> int:
        return self.weight_hh.shape[1]

    def reset_parameters(self) -> None:
        """Xavier input weights, orthogonal recurrence, forget bias 1 (Jozefowicz et al., 2015): long memory."""
        with torch.no_grad():
            for w in self.weight_ih.chunk(4):
                nn.init.xavier_uniform_(w)
            for w in self.weight_hh.chunk(4):
                nn.init.orthogonal_(w)
            nn.init.zeros_(self.bias_hh)
            nn.init.zeros_(self.bias_ih)
            self.bias_ih[self.units : 2 * self.units] = 1.0

    def remember_up_to(self, tokens: int) -> None:
        """Chrono initialisation of the biases: time constants spread between 1 and `tokens` - 1."""
        with torch.no_grad():
            forget = torch.empty(self.units).uniform_(1, max(2, tokens - 1)).log()
            self.bias_ih[self.units : 2 * self.units] = forget
            self.bias_ih[: self.units] = -forget

    def cell(self) -> kernels.Cell:
        return kernels.Cell(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class MultiHeadBiLSTM(Replacement):
    """H independent bidirectional LSTMs between a shared input and output projection.

    `p = pre_proj(x)` is split into H chunks of width d = D / H; each head reads its chunk forward and backward;
    `head_proj` maps the head's u[h][0] + u[h][1] hidden units to d channels of z. No weight joins two heads.
    """

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, num_heads, num_tokens, units)
        d = dim // num_heads
        self.backend = "auto"
        units = units or [(d, d)] * num_heads
        self.pre_proj = nn.Linear(dim, dim)
        self.lstm = nn.ModuleList(nn.ModuleList(DirectionLSTM(d, u) for u in pair) for pair in units)
        self.head_proj = nn.ModuleList(nn.Linear(sum(pair), d) for pair in units)

    @property
    def units(self) -> list[list[int]]:
        """u[h][r]: kept units per head and direction."""
        return [[direction.units for direction in head] for head in self.lstm]

    def mix(self, x: Tensor) -> Tensor:
        b, n, dim = x.shape
        p = self.pre_proj(x).view(b, n, self.num_heads, dim // self.num_heads)  # (B, N, H, d)
        heads = self.hidden(p).split([sum(pair) for pair in self.units], dim=2)
        return torch.cat([proj(h) for proj, h in zip(self.head_proj, heads, strict=True)], dim=2)

    def hidden(self, p: Tensor) -> Tensor:
        """Hidden states (B, N, sum u) of head inputs p (B, N, H, d), by the kernel that `backend` names."""
        return kernels.compute(self.backend, p, [direction.cell() for head in self.lstm for direction in head])

    def init_from_attention(self, attn: nn.Module, init: str) -> None:
        """Where the LSTMs start. `chrono` was the best of the three on the digits (README, ablation).

        random: pre_proj by torch, forget bias 1. value: pre_proj is the teacher's value projection, what attention
        averages.
        chrono: that, and units that remember for between 1 and N tokens, forget bias log U(1, N - 1), input bias its
        negative (Tallec & Ollivier, arXiv 1804.11188): attention reads all tokens, an LSTM must first learn to
        hold them.
        """
        super().init_from_attention(attn, init)
        if init == "chrono":
            for direction in self.lstm.modules():
                if isinstance(direction, DirectionLSTM):
                    direction.remember_up_to(self.num_tokens)
        if init in ("value", "chrono"):
            with torch.no_grad():
                self.pre_proj.weight.copy_(attn.qkv.weight[-self.dim :])
                if attn.qkv.bias is not None:
                    self.pre_proj.bias.copy_(attn.qkv.bias[-self.dim :])

    def to_dense(self) -> nn.LSTM:
        """The published shape of the same function: one bidirectional LSTM with our blocks on its diagonal.

        Rows are gate-major (row = gate * H * u + head * u + unit). Ragged heads are padded with zero units.
        Its output (B, N, 2 H u) holds all forward units, then all backward ones.
        """
        d, width = self.dim // self.num_heads, max(max(pair) for pair in self.units)
        like = self.pre_proj.weight
        dense = nn.LSTM(self.dim, self.num_heads * width, batch_first=True, bidirectional=True)
        dense = dense.to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for r, suffix in enumerate(("", "_reverse")):
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    target = getattr(dense, f"{kind}_l0{suffix}").zero_().unflatten(0, (4, self.num_heads, width))
                    for h, head in enumerate(self.lstm):
                        u = head[r].units
                        block = getattr(head[r], kind).unflatten(0, (4, u))
                        if kind == "weight_ih":
                            target[:, h, :u, h * d : (h + 1) * d] = block
                        elif kind == "weight_hh":
                            target[:, h, :u, h * width : h * width + u] = block
                        else:
                            target[:, h, :u] = block
        return dense


class SingleLSTM(MultiHeadBiLSTM):
    """The same with one head of width D."""

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, 1, num_tokens, units)


class TokenMixer(Replacement):
    """An MLP across tokens with hidden width 2 N (MLP-Mixer, arXiv 2105.01601): z = fc2(gelu(fc1(x^T)))^T, fixed N."""

    def __init__(self, dim: int, num_heads: int, num_tokens: int, units: Sequence[Sequence[int]] | None = None):
        super().__init__(dim, num_heads, num_tokens, units)
        self.fc1 = nn.Linear(num_tokens, 2 * num_tokens)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * num_tokens, num_tokens)

    def mix(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x.transpose(1, 2)))).transpose(1, 2)  # (B, D, N) inside


REPLACEMENTS: dict[str, type[Replacement]] = {"multi-lstm": MultiHeadBiLSTM, "lstm": SingleLSTM, "mixer": TokenMixer}
