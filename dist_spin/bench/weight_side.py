"""The formulation that rotating activations replaces, to measure against: every weight rotated in fp64 in every forward.

Written from the published description (Liu et al. 2024, SpinQuant): each linear merges R1 and R2 into its frozen weight
in fp64, casts the product to the model's dtype and quantises its own input; layers are checkpointed, so the backward pass
rotates again; autograd forms the weight's gradient to reach R. Eager, as its release runs.
"""

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_spin.bench.device import synchronize
from dist_spin.model.architecture import Shape, rotary, skeleton
from dist_spin.model.loss import cross_entropy
from dist_spin.model.rotation import initial
from dist_spin.model.sites import KeySite
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.cayley import retract_rows, step_size, tangent
from dist_spin.numerics.hadamard_transform import kronecker_apply
from dist_spin.numerics.quantizer import QuantSpec, fake_quantize


class _RotatingLinear(nn.Module):
    """x to Q(x) W'^T, W' merged from `weight` in fp64 in every forward pass."""

    def __init__(self, role: str, weight: Tensor, r1: Tensor, r2: Tensor, sites: Sites) -> None:
        super().__init__()
        self.role, self.r1, self.r2, self.sites = role, r1, r2, sites
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _merged(self) -> Tensor:
        w, r1 = self.weight.double(), self.r1.double()
        w = r1.T @ w if self.role in ("o_proj", "down_proj") else w @ r1
        if self.role == "v_proj":
            w = (self.r2.double().T @ w.unflatten(0, (-1, len(self.r2)))).flatten(0, 1)
        elif self.role == "o_proj":
            w = (w.unflatten(1, (-1, len(self.r2))) @ self.r2.double()).flatten(1)
        return w.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.role == "down_proj":
            x = kronecker_apply(x, self.sites.r4)
        spec: QuantSpec = self.sites.o if self.role == "o_proj" else self.sites.a
        y = nn.functional.linear(fake_quantize(x, spec), self._merged())
        return fake_quantize(y, self.sites.v) if self.role == "v_proj" else y


class _WeightSide(nn.Module):
    """Decoder layers of a shape with random weights, embedding and head left unrotated (they favour this side)."""

    def __init__(self, config: Any, sites: Sites, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        base, shape = skeleton(config), Shape.of(config)
        sites = sites.to(device, dtype)
        r1, r2 = initial("hadamard", shape, 0)
        self.r1 = nn.Parameter(r1.to(device, torch.float32))
        self.r2 = nn.ParameterList([nn.Parameter(r.to(device, torch.float32)) for r in r2])
        generator = torch.Generator(device).manual_seed(0)

        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype) * columns**-0.5

        for i, layer in enumerate(base.model.layers):
            for owner in (layer.self_attn, layer.mlp):
                for role, linear in list(owner.named_children()):
                    if isinstance(linear, nn.Linear):
                        weight = random(*linear.weight.shape)
                        setattr(owner, role, _RotatingLinear(role, weight, self.r1, self.r2[i], sites))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight = nn.Parameter(torch.ones(shape.hidden, device=device, dtype=dtype), requires_grad=False)
            layer.self_attn.key_site = KeySite(sites.k, sites.r3)
        self.layers = base.model.layers
        self._embeddings = (random(shape.vocab, shape.hidden), random(shape.vocab, shape.hidden))
        self._rotary = (rotary(base, device),)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self._embeddings[0][ids].requires_grad_()
        position_embeddings = self._rotary[0](hidden, torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.layers:
            hidden = checkpoint(
                layer, hidden, use_reentrant=False, position_embeddings=position_embeddings, use_cache=False
            )
        return cross_entropy(hidden, self._embeddings[1], ids).mean()


def measure(
    config: Any, sites: Sites, device: torch.device, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, float]:
    """Median seconds of forward, backward and Cayley step for one sequence of `tokens` tokens on one device."""
    model, timed = _WeightSide(config, sites, device, dtype), []
    ids = torch.randint(0, Shape.of(config).vocab, (1, tokens), device=device)
    for _ in range(steps + 1):
        marks = [time.monotonic()]
        loss = model(ids)
        synchronize(device)
        marks.append(time.monotonic())
        loss.backward()
        synchronize(device)
        marks.append(time.monotonic())
        with torch.no_grad():
            for r in (model.r1, *model.r2):
                assert r.grad is not None
                direction = tangent(r.grad @ r.T)
                r.copy_(retract_rows(r, direction, step_size(r, direction, 1.5)[0]))
                r.grad = None
        synchronize(device)
        marks.append(time.monotonic())
        timed.append([b - a for a, b in itertools.pairwise(marks)])
    names = ("forward", "backward", "cayley")
    return {f"{name}_s": statistics.median(t[i] for t in timed[1:]) for i, name in enumerate(names)}
