"""A checkpoint for ExecuTorch's pre-quantised Llama loader: int4 weights in groups beside int8 activations per token ("8da4w").

`consolidated.00.pth` holds Meta's names: codes as int8 in `.weight`, scales fp32 [out, in / group] in `.scales`; the embedding
and lm_head in 8 bits or as they are. `params.json` describes the model. Queries and keys are reordered from Hugging Face's
rotary layout (halves of a head) to Meta's (neighbouring pairs), which the loader's position embedding wants.
The loader is `executorch.examples.models.llama.model.Llama2Model`; `loader_settings` says what to set in its configuration.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.storage.atomic import atomic, write_json
from dist_spin.storage.quantized_layers import QuantizedLayer

WEIGHTS, PARAMS = "consolidated.00.pth", "params.json"
META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
META_NORMS = {ATTENTION_NORM: "attention_norm", MLP_NORM: "ffn_norm"}
TURNED = ("self_attn.q_proj", "self_attn.k_proj")  # by the position embedding
EmbeddingWeight = QuantizedWeight | Tensor  # quantised, or [vocab, h] as it is


def loader_settings(embeddings: set[str], group_size: int, r4: bool) -> dict[str, dict[str, Any]]:
    """The entries of ExecuTorch's LlmConfig with which it loads the checkpoint; file names are the caller's.

    Args:
        ends: those of `embedding` and `head` that are quantised.
    """
    base: dict[str, Any] = {
        "preq_mode": "8da4w_output_8da8w" if "head" in embeddings else "8da4w",
        "preq_group_size": group_size,
        "preq_embedding_quantize": "8,0" if "embedding" in embeddings else "",
    }
    # Either leads to the pre-quantised loader; the first also has R4 put in front of w2 when a program is exported.
    online = {"use_spin_quant": "native"} if r4 else {"use_qat": True}
    return {"base": base, "model": {"dtype_override": "fp32"}, "quantization": online}


def write_executorch(
    directory: Path,
    params: dict[str, Any],
    *,
    layer: Callable[[int], QuantizedLayer],
    embedding: Callable[[], EmbeddingWeight],
    head: Callable[[], EmbeddingWeight],
    between: Callable[[int], None],
) -> None:
    """Write `consolidated.00.pth` and `params.json`; no more than a layer is in memory, the rest lies in mapped files.

    Args:
        params: as from `model_params`. layer: decoder layer i, 4-bit symmetric codes in groups. between: called before each
            layer, with its number.
    """
    scratch = Mapped(directory)
    ones = torch.ones(params["dim"])
    scratch.add(_end("tok_embeddings", embedding()))
    for index in range(params["n_layers"]):
        between(index)
        named = _layer(layer(index), params["head_dim"], ones)
        scratch.add({f"layers.{index}.{name}": tensor for name, tensor in named.items()})
    scratch.add({"norm.weight": ones, **_end("output", head())})
    with atomic(directory / WEIGHTS) as temporary:
        torch.save(scratch.tensors, temporary)
    scratch.remove()
    write_json(directory / PARAMS, params)


class Mapped:
    """Tensors whose memory is files in `directory`, so that a checkpoint larger than memory can be gathered."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Tensor] = {}

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Keep copies of them."""
        for name, tensor in tensors.items():
            path = str(self._path(len(self.tensors)))
            kept = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            self.tensors[name] = kept.copy_(tensor)

    def remove(self) -> None:
        """Delete the files."""
        for number in range(len(self.tensors)):
            self._path(number).unlink()
        self.tensors = {}

    def _path(self, number: int) -> Path:
        return self.directory / f"{number}.mapped"


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * d, ...] of a query or key projection in Meta's order: rows i and i + d / 2 of a head side by side."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _layer(layer: QuantizedLayer, head_dim: int, ones: Tensor) -> dict[str, Tensor]:
    # Gains are folded into the linears; what a norm holds instead are learned scales.
    out = {f"{meta}.weight": layer.others.get(f"{norm}.weight", ones).float() for norm, meta in META_NORMS.items()}
    for role, name in META_NAMES.items():
        quantized = layer.quantized_weights[role]
        parts = {"weight": quantized.codes, "scales": quantized.scale.float()}
        for kind, tensor in parts.items():
            out[f"{name}.{kind}"] = interleaved(tensor, head_dim) if role in TURNED else tensor
    return out


def _end(name: str, end: EmbeddingWeight) -> dict[str, Tensor]:
    if isinstance(end, Tensor):
        return {f"{name}.weight": end.float()}
    return {f"{name}.weight": end.codes, f"{name}.scales": end.scale.float()}
