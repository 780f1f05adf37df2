"""Embedding and lm_head of a quantised model, rounded to nearest with one scale per row.

They are made once from the merged 16-bit weights. Calibration runs on the embedding as it was: jobs that start in the middle
of the model do so too, and at the 8 bits meant for it the difference is far below that of the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.numerics.quantizer import dequantize_weight, quantize_weight, weight_scales
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.variants import Variant
from dist_spin.storage.quantized_layers import embeddings_path, finished_embeddings, save_embeddings
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import identity_hash

ROWS_AT_ONCE = 8192  # of the vocabulary, so that fp32 copies stay small beside the weight itself


def quantized_embedding_bits(config: RunConfig) -> dict[str, int]:
    """Bits of `embedding` and `head`, those that are quantised at all."""
    bits = {"embedding": config.quant.embedding_bits, "head": config.quant.head_bits}
    return {name: width for name, width in bits.items() if width < 16}


@dataclass
class QuantizedEmbeddings:
    """Embedding and lm_head of one variant, kept in the file at `path`; `bits` names those that are quantised."""

    weights: RotatedWeights
    bits: dict[str, int]
    mse_clip: bool
    path: Path
    fingerprint: str

    def make(self, warn: Callable[[str], None]) -> bool:
        """Write the file unless there is nothing to quantise or it is there and whole; True if it was written."""
        if not self.bits or finished_embeddings(self.path, self.fingerprint, warn) is not None:
            return False
        read = {"embedding": self.weights.embedding, "head": self.weights.head_weight}
        embeddings = {name: self._rounded(read[name](), bits) for name, bits in self.bits.items()}
        save_embeddings(self.path, embeddings, self.bits, self.fingerprint)
        return True

    def load(self, dtype: torch.dtype, device: torch.device, warn: Callable[[str], None]) -> dict[str, Tensor]:
        """The quantised weights by name, `embedding` and `head`, dequantised, each [vocab, h].

        Raises:
            UserError: they are not there.
        """
        embeddings = finished_embeddings(self.path, self.fingerprint, warn) if self.bits else {}
        if embeddings is None:
            raise UserError(f"{self.path} is missing", "run `dist-spin quantize` first")
        out = {}
        for name, quantized in embeddings.items():
            codes, scale, zero = (part.to(device) for part in quantized)
            out[name] = dequantize_weight(codes, scale, zero, dtype=dtype)
        return out

    def _rounded(self, weight: Tensor, bits: int) -> QuantizedWeight:
        parts = []
        for rows in weight.split(ROWS_AT_ONCE):
            scale, zero = weight_scales(rows, bits, mse_clip=self.mse_clip)
            parts.append((quantize_weight(rows, scale, zero, bits).cpu(), scale.cpu(), zero.cpu()))
        return QuantizedWeight(*(torch.cat(part) for part in zip(*parts, strict=True)))


def embeddings_of(config: RunConfig, files: ModelFiles, variant: Variant) -> QuantizedEmbeddings:
    """The embedding and lm_head of a variant under a configuration's bits."""
    bits, clip = quantized_embedding_bits(config), config.quant.w_mse_clip
    identity = {
        "model": files.weights.fingerprint(),
        "dtype": dtype_name(config),
        "rotations": variant.digest,
        "bits": bits,
        "mse_clip": clip,
    }
    directory = run_dir(config).layers(variant.name)
    return QuantizedEmbeddings(variant.weights, bits, clip, embeddings_path(directory), identity_hash(identity))
