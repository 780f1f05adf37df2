"""Activation statistics of one variant in a run: one small safetensors file each, whatever the size of the model."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import CorruptFile, load_tensors, read_metadata, save_tensors

# Where activations are quantised, and what stands there.
SITES = {
    "attention_input": "attention input (q, k, v)",
    "o_input": "o_proj input",
    "mlp_input": "MLP input (gate, up)",
    "down_input": "down_proj input",
    "keys": "keys",
    "values": "values",
}
FIGURES = ("peak", "kurtosis", "channels", "surface")


@dataclass
class Statistics:
    """Figures of every site and layer of a variant, and how far the pass has come.

    layers: site -> figure -> one tensor per finished layer. peak, kurtosis: [4] over tokens (`activations.SUMMARY`);
    channels: largest |x| of each channel or bin of channels; surface: largest |x| in a grid tokens x channels.
    hidden: what enters the next layer, each [1, T, h]; empty once all layers are done.
    """

    layers: dict[str, dict[str, list[Tensor]]]
    hidden: list[Tensor]

    @staticmethod
    def empty() -> "Statistics":
        """Before the first layer."""
        return Statistics({site: {figure: [] for figure in FIGURES} for site in SITES}, [])

    @property
    def done(self) -> int:
        """How many layers have figures."""
        return len(self.layers["keys"]["peak"])


def statistics_path(run: RunDir, variant: str) -> Path:
    """Where the figures of a variant ("none", "hadamard", "learned", ...) are."""
    return run.path / "statistics" / f"{variant}.safetensors"


def save_statistics(path: Path, statistics: Statistics, fingerprint: str, tokens: int) -> None:
    """Write what there is, atomically and with a checksum. tokens: how many were measured."""
    tensors = {
        f"{site}.{figure}": torch.stack(layers)
        for site, figures in statistics.layers.items()
        for figure, layers in figures.items()
        if layers
    }
    tensors |= {f"hidden.{i:04d}": h for i, h in enumerate(statistics.hidden)}
    metadata = {"fingerprint": fingerprint, "tokens": str(tokens), "complete": json.dumps(not statistics.hidden)}
    save_tensors(path, tensors, metadata)


def load_statistics(path: Path) -> tuple[Statistics, dict[str, str]]:
    """What `save_statistics` wrote, and its metadata: fingerprint, tokens, complete ("true" or "false").

    Raises:
        CorruptFile: the file is torn, damaged or of another kind.
    """
    tensors, metadata = load_tensors(path)
    if not {"fingerprint", "tokens", "complete"} <= metadata.keys():
        raise CorruptFile(f"{path}: holds no statistics")
    statistics = Statistics.empty()
    for site, figures in statistics.layers.items():
        for figure in figures:
            figures[figure] = list(tensors.get(f"{site}.{figure}", torch.empty(0)))
    statistics.hidden = [tensors[name] for name in sorted(tensors) if name.startswith("hidden.")]
    return statistics, metadata


def statistics_complete(path: Path, fingerprint: str) -> bool:
    """Whether all layers were measured under `fingerprint`; reads the file's header alone."""
    metadata = read_metadata(path) or {}
    return metadata.get("fingerprint") == fingerprint and metadata.get("complete") == "true"
