"""Decoder layers of a Llama shape written out for timing: every linear a kernel, the online Hadamards on or off.

q, k, v and gate, up are one product each, as servers do it. Norm gains are folded away, as after a merge. Elementwise chains
between the products are compiled, so that what is timed is not the interpreter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from dist_spin.bench.linear_kernels import LinearKernel, make
from dist_spin.model.architecture import Shape

EPS = 1e-5
ROPE_BASE = 500_000.0


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a gain; x [tokens, h]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y and its norm; both [tokens, h]."""
    total = x + y
    return total, norm(total)


def gate(both: Tensor) -> Tensor:
    """silu(gate) * up from [tokens, 2 i] to [tokens, i]."""
    left, right = both.chunk(2, -1)
    return silu(left) * right


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; x [batch, T, heads, d], cos and sin [T, 1, d / 2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, d / 2], fp32, of positions [T]."""
    steps = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None].float() * ROPE_BASE**-steps
    return angles.cos()[:, None], angles.sin()[:, None]


@dataclass
class Layer:
    """The four products of one decoder layer."""

    qkv: LinearKernel
    o: LinearKernel
    gate_up: LinearKernel
    down: LinearKernel


def layer_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """[out, in] of a layer's products."""
    d, h, i = shape.head_dim, shape.hidden, shape.intermediate
    return {
        "qkv": ((shape.heads + 2 * shape.kv_heads) * d, h),
        "o": (h, shape.heads * d),
        "gate_up": (2 * i, h),
        "down": (h, i),
    }


def random_weight(size: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """A seeded random weight [out, in], bf16, that keeps the size of its input."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).mul_(size[1] ** -0.5)


class Decoder:
    """A stack of layers with distinct random weights on one kernel.

    layers: how many. fuse: compiles a chain of elementwise operations. rows: the numbers of tokens that will come.
    Raises Unavailable as `linear_kernels.make` does.
    """

    def __init__(
        self,
        shape: Shape,
        layers: int,
        kernel: str,
        device: torch.device,
        fuse: Callable[[Any], Any],
        rows: Sequence[int],
    ) -> None:
        self.shape, self.device = shape, device
        sizes = layer_sizes(shape)
        self.layers = []
        for index in range(layers):
            kernels = {
                name: make(kernel, random_weight(size, 10 * index + n, device), fuse, rows)
                for n, (name, size) in enumerate(sizes.items())
            }
            self.layers.append(Layer(**kernels))
        self._norm, self._add_norm, self._gate, self._rotate = (fuse(f) for f in (norm, add_norm, gate, rotate))

    @property
    def weight_bytes(self) -> int:
        """What one pass over all weights reads."""
        return sum(kernel.weight_bytes for layer in self.layers for kernel in vars(layer).values())

    @torch.no_grad()
    def run(
        self,
        x: Tensor,
        cache: list[Tensor] | None = None,
        r3: Callable[[Tensor], Tensor] | None = None,
        r4: Callable[[Tensor], Tensor] | None = None,
        r4_in_kernel: int = 0,
    ) -> Tensor:
        """Hidden states x [batch, T, h] through all layers, [batch, T, h] back.

        Args:
            cache: keys and values of every layer, [2, batch, kv_heads, context, d]; T must be 1, and the token takes the last
                place of the context. Without one, T tokens attend to themselves causally.
            r3: turns queries and keys, over the last dimension. r4: turns the input of the down projection.
            r4_in_kernel: the down projection's kernel turns its input itself, in blocks of so many channels; 0: it does not.
        """
        batch, T, h = x.shape
        s = self.shape
        start = 0 if cache is None else cache[0].shape[3] - 1
        cos, sin = rotary_tables(torch.arange(start, start + T, device=self.device), s.head_dim)
        total = x.reshape(-1, h)
        normed = self._norm(total)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(normed).view(batch, T, -1, s.head_dim)
            rotated = self._rotate(qkv[:, :, : s.heads + s.kv_heads], cos, sin)  # q and k, [batch, T, heads, d]
            if r3 is not None:
                rotated = r3(rotated)
            q, k, v = rotated[:, :, : s.heads], rotated[:, :, s.heads :], qkv[:, :, s.heads + s.kv_heads :]
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            if cache is not None:
                cache[index][0][:, :, -1:] = k
                cache[index][1][:, :, -1:] = v
                k, v = cache[index]
            attended = scaled_dot_product_attention(
                q, k, v, is_causal=cache is None, scale=1 / math.sqrt(s.head_dim), enable_gqa=s.heads != s.kv_heads
            )
            attended = attended.transpose(1, 2).reshape(batch * T, -1)
            total, normed = self._add_norm(total, layer.o(attended))
            gated = self._gate(layer.gate_up(normed))
            if r4_in_kernel:
                down: Tensor = layer.down.rotated(gated, r4_in_kernel)  # type: ignore[attr-defined]
            else:
                down = layer.down(gated if r4 is None else r4(gated))
            total, normed = self._add_norm(total, down)
        return total.view(batch, T, h)


def empty_cache(
    shape: Shape, layers: int, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Keys and values of `layers` layers for a context, seeded random: their values decide no time, but NaN would show."""
    generator = torch.Generator(device).manual_seed(2)
    size = (2, batch, shape.kv_heads, context, shape.head_dim)
    return [torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(layers)]
