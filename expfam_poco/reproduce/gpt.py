"""A small GPT: pre-norm blocks, causal attention by `scaled_dot_product_attention`, rotary or learned positions.

`F.scaled_dot_product_attention` takes flash attention where the device and dtype have it. Input and output embedding
are one matrix, there are no biases, and weights start as in GPT-2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """The shape of a model.

    Args:
        layers: number of blocks.
        heads: attention heads of a block; they divide width, and rotary positions need an even width of a head.
        width: size of the residual stream.
        vocabulary: number of tokens.
        context: the longest input.
        positions: "rope" (Su et al. 2021) or "learned".
        dropout: of the embedding, of attention and of both residual branches.
    """

    layers: int
    heads: int
    width: int
    vocabulary: int = 256
    context: int = 128
    positions: str = "rope"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions={self.positions!r}: choose 'rope' or 'learned'.")
        if self.width % self.heads or (self.positions == "rope" and self.width // self.heads % 2):
            raise ValueError(
                f"heads={self.heads}: the width ({self.width}) must be a multiple of it, and an even one for rotary "
                "positions."
            )


# "33m" and "125m" are the paper's shapes: 33 M weights with a vocabulary of 40,000, 124 M with GPT-2's 50,257.
PRESETS = {
    "nano": Config(layers=2, heads=2, width=64),
    "tiny": Config(layers=2, heads=4, width=128),
    "small": Config(layers=4, heads=4, width=192),
    "10m": Config(layers=6, heads=8, width=384),
    "33m": Config(layers=4, heads=4, width=512),
    "125m": Config(layers=12, heads=12, width=768, positions="learned"),
}


def preset(name: str, **changes: Any) -> Config:
    """A preset by name, with changes."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: choose from {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)


def angles(length: int, width: int) -> Tensor:
    """Rotary angles of shape (length, width / 2): position / 10000^(2i/width)."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.arange(length, dtype=torch.float32)[:, None] * frequency


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + width/2}) by its angle, so that products of two depend on their distance alone."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.inputs = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angle: Tensor | None) -> Tensor:
        """Values of earlier tokens, mixed."""
        rows, length, width = x.shape
        parts = self.inputs(x).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if angle is not None:
            query, key = rotate(query, angle), rotate(key, angle)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Attention and a two-layer network, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, bias=False)
        self.expand = nn.Linear(config.width, 4 * config.width, bias=False)
        self.contract = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angle: Tensor | None) -> Tensor:
        """The residual stream after both."""
        x = x + self.dropout(self.attention(self.norm1(x), angle))
        return x + self.dropout(self.contract(functional.gelu(self.expand(self.norm2(x)))))


class GPT(nn.Module):
    """The model: tokens (rows × length) to logits (rows × length × vocabulary).

    Args:
        config: its shape. The weights come from torch's global generator.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("angle", angles(config.context, config.width // config.heads), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # The two layers of a block that add to the residual stream: smaller, so that their sum is not.
                adds = name.endswith(("output.weight", "contract.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers) if adds else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, at every token."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens: {length} of them, and the context is {self.config.context}; give fewer.")
        x = self.embedding(tokens)
        angle = None
        if self.positions is None:
            angle = self.get_buffer("angle")[:length]
        else:
            x = x + self.positions(torch.arange(length, device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, angle)
        return functional.linear(self.norm(x), self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood (nats a token) of every token but the first, given those before it."""
        logits = self(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int, *, temperature: float = 0.8, seed: int = 0) -> Tensor:
        """`count` tokens after a prompt (one dimension), drawn at a temperature."""
        generator = torch.Generator(prompt.device).manual_seed(seed)
        training = self.training
        self.eval()
        tokens = prompt
        for _ in range(count):
            logits = self(tokens[None, -self.config.context :])[0, -1].float()
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, chosen])
        self.train(training)
        return tokens


def parameters_of(config: Config) -> int:
    """The number of weights; nothing is allocated."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in GPT(config).parameters())
