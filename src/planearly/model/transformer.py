"""The dense model, whole: a decoder that stock `transformers` architectures hold exactly.

Pre-norm blocks of causal attention with rotary positions and a feed-forward network, RMSNorm, no
biases. With the gated feed-forward this is Llama; with a plain one (the paper's, section 4) it is
Arcee, which is Llama with an ungated feed-forward. :mod:`planearly.model.hf` maps the names.

Nothing here knows of optimisers, devices or processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planearly import keys
from planearly.model import loss
from planearly.model.attention import causal

GATED = "swiglu"
FFN_MATRICES = {"swiglu": ("gate", "up", "down"), "gelu": ("up", "down"), "relu2": ("up", "down")}
"""The feed-forward matrices of each kind, in order."""


@dataclass(frozen=True)
class Shape:
    """What fixes a dense model's parameters and function."""

    layers: int
    d_model: int
    heads: int
    d_ff: int
    vocab_size: int
    context: int
    ffn: str = GATED
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    kv_heads: int | None = None
    """Heads of keys and values, each read by ``heads / kv_heads`` queries (grouped-query attention,
    Ainslie et al. 2023); None where every query head has its own."""

    def __post_init__(self) -> None:
        if self.kv_heads == self.heads:  # one way to say it
            object.__setattr__(self, "kv_heads", None)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value matrices."""
        keys = (self.kv_heads or self.heads) * self.head_dim
        return self.d_model, keys, keys

    @classmethod
    def of(cls, model: keys.Model, vocab_size: int, context: int) -> Shape:
        """The shape that a recipe's ``model`` section asks for."""
        return cls(vocab_size=vocab_size, context=context, **dataclasses.asdict(model))

    def to_dict(self) -> dict[str, object]:
        """Plain values; ``kv_heads`` only where it is set, so that the others stay as they were."""
        values = dataclasses.asdict(self)
        if self.kv_heads is None:
            del values["kv_heads"]
        return values


def rotary(context: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_dim] of the rotary position embedding (Su et al. 2021)."""
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of ``x`` [rows, heads, time, head_dim] by position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal multi-head or grouped-query attention; query, key and value matrices are stacked."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        keys = shape.kv_heads or shape.heads
        self.heads = (shape.heads, keys, keys)
        self.widths = shape.qkv_widths
        self.qkv = nn.Linear(shape.d_model, sum(self.widths), bias=False)
        self.o = nn.Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, time, width = x.shape
        heads = self.qkv(x).view(rows, time, sum(self.heads), -1).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = causal(q, k, v)
        return self.o(y.transpose(1, 2).reshape(rows, time, width))


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(act(up x)) with GELU (tanh form) or squared ReLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.kind = shape.ffn
        if shape.ffn == GATED:
            self.gate = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.up = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.down = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == GATED:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, run: Run | None = None) -> Tensor:
        """
        Args:
            run: :meth:`compute`, or a compiled form of it.
        """
        return (run or Block.compute)(self, x, cos, sin)

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


Run = Callable[[Block, Tensor, Tensor, Tensor], Tensor]


def initial_std(name: str, matrix: Tensor, shape: Shape) -> float:
    """Standard deviation that a matrix [out, in] of the dense model starts with.

    The variance is 2 / (5 d_in) (Nguyen and Salazar 2019: 0.02 at width 1,024); the matrices that
    write to the residual stream are scaled by (2 layers)^-1/2 (GPT-2).
    """
    fan_in = shape.d_model if name == "embed.weight" else matrix.shape[1]
    std = (0.4 / fan_in) ** 0.5
    if name.endswith(("attn.o.weight", "ffn.down.weight")):
        std *= (2 * shape.layers) ** -0.5
    return std


@dataclass
class Kernels:
    """The functions in which all of a model's time goes, to be replaced by compiled ones.

    They are functions of a block and of a chunk of the output, not the model: compiled once, they
    serve every layer and every chunk, so compiling takes no longer for a deeper model.
    """

    block: Run = Block.compute
    chunk: loss.Chunk = loss.chunk


class Transformer(nn.Module):
    """The dense language model; weights start normal, see :func:`initial_std`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.kernels = Kernels()
        with torch.device("meta"):
            self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
            self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
            if not shape.tie_embeddings:
                self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        self.to_empty(device="cpu")
        cos, sin = rotary(shape.context, shape.head_dim, shape.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw fresh weights, a function of ``seed`` and the shape only."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            parameter.normal_(0.0, initial_std(name, parameter, self.shape), generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """Output matrix [vocab_size, d_model]."""
        return self.embed.weight if self.shape.tie_embeddings else self.head.weight

    @property
    def head_parameters(self) -> list[Tensor]:
        """What :meth:`logits` is made of."""
        return [self.head_weight]

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., vocab_size] of final states [..., d_model]."""
        return F.linear(states, self.head_weight)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Final normed states [rows, time, d_model] of token ids [rows, time]."""
        time = inputs.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.embed(inputs)
        for block in self.blocks:  # as modules: their weights may have to be gathered
            x = block(x, cos, sin, self.kernels.block)
        return self.norm(x)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [rows, time, vocab_size] of token ids [rows, time]."""
        return self.logits(self.hidden(inputs))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum, in float32, of the next-token cross-entropies in nats.

        Args:
            inputs: int64 [rows, time].
            targets: int64 [rows, time]; positions with -100, torch's ``ignore_index``, do
                not count.
        """
        return loss.cross_entropy(self.hidden(inputs).flatten(0, 1), self.head_weight,
                                  targets.flatten(), self.kernels.chunk)
