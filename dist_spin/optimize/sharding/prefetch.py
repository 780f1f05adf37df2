"""Layers whose weights lie in host memory: while one computes, the next one is copied to the GPU.

FSDP2 lets gathers run beside computation, but on one rank it has nothing to gather and copies a layer on the very stream that
computes, when it is needed.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class FetchAhead:
    """Hooks on `layers`, in the order of a forward pass, each sharded over one rank with its shards in pinned memory.

    At most one layer is fetched ahead. Layers that are not among them may lie in between, and give the copy its time.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers, self._stream = layers, torch.cuda.Stream(device)
        self._fetched: dict[int, torch.cuda.Event] = {}
        for k, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, k=k: self._advance(k, k + 1))
            layer.register_forward_hook(lambda module, args, out, k=k: self._before_backward(k, out))

    def _before_backward(self, k: int, out: Any) -> None:
        hidden = out[0]  # [batch, T, h]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._advance(k, k - 1))

    def _advance(self, k: int, following: int) -> None:
        """Layer k is about to run: wait for its copy, if it was fetched ahead, and fetch `following`."""
        computing = torch.cuda.current_stream()
        if k in self._fetched:
            computing.wait_event(self._fetched.pop(k))
        if not 0 <= following < len(self._layers):
            return
        # What it is copied into may have been freed by work that is still queued there.
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            cast(FSDPModule, self._layers[following]).unshard()
        self._fetched[following] = cast(torch.cuda.Event, self._stream.record_event())
