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

from dist_spin.export.export_job import DirectoryWriter, ExportFormat, ExportJob
from dist_spin.export.sidecar import write_description
from dist_spin.export.tokenizer import copy_tokenizer
from dist_spin.model.architecture import ATTENTION_NORM, MLP_NORM
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.pipeline.export_limits import model_params
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
ROTARY_LINEARS = ("self_attn.q_proj", "self_attn.k_proj")  # what the position embedding rotates
EmbeddingWeight = QuantizedWeight | Tensor  # quantised, or [vocab, h] as it is


def prepare(job: ExportJob) -> DirectoryWriter:
    """The run's quantised layers under Meta's names.

    Raises:
        UserError: the embeddings cannot be used, or the loader's Llama cannot compute the model.
    """
    group_size, embeddings = job.config.quant.w_group_size, job.quantised_embeddings()
    params = model_params(job.files.config, group_size)

    def write(directory: Path) -> None:
        write_executorch(
            directory,
            params,
            layer=job.quantised_layer,
            embedding=lambda: embeddings.get("embedding") or job.weights.embedding(),
            head=lambda: embeddings.get("head") or job.weights.head_weight(),
            before_layer=job.before_layer(),
        )
        copy_tokenizer(job.files, directory)
        settings = loader_settings(set(embeddings), group_size, r4=job.r4)
        write_description(directory, {**job.description, "llm_config": settings})

    return write


def loader_settings(embeddings: set[str], group_size: int, *, r4: bool) -> dict[str, dict[str, Any]]:
    """The entries of ExecuTorch's LlmConfig with which it loads the checkpoint; file names are the caller's.

    Args:
        embeddings: those of `embedding` and `head` that are quantised.
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
    before_layer: Callable[[int], None],
) -> None:
    """Write `consolidated.00.pth` and `params.json`; no more than a layer is in memory, the rest lies in mapped files.

    Args:
        params: as from `model_params`. layer: decoder layer i, 4-bit symmetric codes in groups. before_layer: called before
            each layer, with its number.
    """
    scratch = Mapped(directory)
    ones = torch.ones(params["dim"])
    scratch.add(_embedding_tensors("tok_embeddings", embedding()))
    for index in range(params["n_layers"]):
        before_layer(index)
        named = _layer(layer(index), params["head_dim"], ones)
        scratch.add({f"layers.{index}.{name}": tensor for name, tensor in named.items()})
    scratch.add({"norm.weight": ones, **_embedding_tensors("output", head())})
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
        """Copy them into files."""
        for name, tensor in tensors.items():
            path = str(self._path(len(self.tensors)))
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            self.tensors[name] = mapped.copy_(tensor)

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
            out[f"{name}.{kind}"] = interleaved(tensor, head_dim) if role in ROTARY_LINEARS else tensor
    return out


def _embedding_tensors(name: str, weight: EmbeddingWeight) -> dict[str, Tensor]:
    if isinstance(weight, Tensor):
        return {f"{name}.weight": weight.float()}
    return {f"{name}.weight": weight.codes, f"{name}.scales": weight.scale.float()}


def loading(job: ExportJob) -> list[str]:
    """The lines of README.md on how to load the export."""
    lines = [
        "ExecuTorch's pre-quantised Llama loader (`executorch.examples.models.llama`), with `consolidated.00.pth` as",
        "`base.checkpoint`, `params.json` as `base.params` and the entries under `llm_config` in `dist_spin.json`.",
        "lm_head's input is quantised there too, where lm_head has 8 bits; the perplexity below is without that.",
    ]
    if job.sites.r4:
        lines += [
            "",
            "**Not without `use_spin_quant: native`**: the weights of `feed_forward.w2` expect an input that is rotated online",
            "by the Hadamard R4. The loader itself does not put it there: the exporter does (`export_llama`), or",
            "`inject_fast_hadamard_transform_native_for_spin_quant(model)`.",
        ]
    return lines


FORMAT = ExportFormat(prepare, loading, r4_applied_by="ExecuTorch's use_spin_quant", loads_here=False)
