"""What `dist_spin.load` computes of an export, quantised where the engine quantises: the figures to compare with."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.export.loader import load_with_sites
from dist_spin.export.sidecar import Sidecar
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.quantizer import QuantSpec


@dataclass(frozen=True)
class Expected:
    """What the oracle computes, natural log-probabilities in fp32 on the CPU.

    Args:
        windows: of the next token, at every place of every window but the last, [n, T - 1].
        written: of what the engine wrote, token by token, [n, tokens]. best: of the oracle's own choice there.
        unrounded: as `windows`, with activations left in the model's number format; None where they are not quantised.
    """

    windows: Tensor
    written: Tensor
    best: Tensor
    unrounded: Tensor | None


def served_sites(sidecar: Sidecar, kv_cache_dtype: str) -> Sites:
    """The quantisers that an engine applies: none to a merged model, and to keys and values only where its cache does."""
    sites, none = sidecar.sites, QuantSpec()
    if sidecar.format == "hf":
        return dataclasses.replace(sites, a=none, o=none, k=none, v=none)
    return dataclasses.replace(sites, k=none, v=none) if kv_cache_dtype == "auto" else sites


def expected(directory: Path, sidecar: Sidecar, sites: Sites, windows: Tensor, greedy: Tensor) -> Expected:
    """What the export computes of windows [n, T] and of what an engine continued their first halves with, [n, tokens].

    Raises:
        UserError: as `dist_spin.load`.
    """
    model = load_with_sites(directory, sidecar, sites)
    half = windows.shape[1] // 2
    log_probs = _log_probs(model, windows)
    continued = _log_probs(model, torch.cat([windows[:, :half], greedy], 1))[:, half - 1 :]
    unrounded = None
    if sites.a.enabled:
        del model  # two copies would not always fit
        plain = dataclasses.replace(sites, a=QuantSpec(), o=QuantSpec())
        unrounded = _next(_log_probs(load_with_sites(directory, sidecar, plain), windows), windows[:, 1:])
    return Expected(_next(log_probs, windows[:, 1:]), _next(continued, greedy), continued.amax(-1), unrounded)


@torch.no_grad()
def _log_probs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Of every token after each place but the last, [n, T - 1, vocab]; one window at a time, since vocabularies are large."""
    device = next(model.parameters()).device
    return torch.cat([model(row[None].to(device)).logits[:, :-1].float().log_softmax(-1).cpu() for row in ids])


def _next(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None])[..., 0]
