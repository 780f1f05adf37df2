"""The hf format: the merged weights in 16 bits or wider, as a Hugging Face directory.

Where R4 is part of the weights, only `dist_spin.load` may load it: config.json and the name of down_proj say so.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from dist_spin.export.card import LOAD_EXAMPLE, MERGED
from dist_spin.export.export_job import DirectoryWriter, ExportFormat, ExportJob
from dist_spin.export.serving import serve_command, takes_activation, tried_engine
from dist_spin.model.expert_storage import layer_in_checkpoints
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles

DOWN, ROTATED_DOWN = "mlp.down_proj.weight", "mlp.down_proj.weight_after_r4"
FOREIGN_TYPE = "dist_spin_{}"


def prepare(job: ExportJob) -> DirectoryWriter:
    """The merged weights of the run; nothing is read before the directory is written."""

    def layer(index: int) -> dict[str, Tensor]:
        weights = job.weights.layer(index)
        if job.r4:
            return rename_down(weights)
        return layer_in_checkpoints(job.files.config.model_type, weights)

    def write(directory: Path) -> None:
        job.write_checkpoint(directory, layer, hide_from_others(job.files) if job.r4 else {})
        job.write_sidecar(directory)

    return write


def hide_from_others(files: ModelFiles) -> dict[str, Any]:
    """Entries of config.json with which transformers, vLLM and converters refuse a model whose R4 they would leave out."""
    return {"model_type": FOREIGN_TYPE.format(files.config.model_type), "architectures": ["DistSpinForCausalLM"]}


def rename_down(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with down_proj under a name of ours, and an empty tensor under its own.

    Loading with a model class that is named by hand goes past config.json; it then stops with an error about the size.
    """
    renamed = {ROTATED_DOWN if name == DOWN else name: tensor for name, tensor in weights.items()}
    return renamed | {DOWN: weights[DOWN].new_empty(0)}


def loading(job: ExportJob) -> list[str]:
    """The lines of README.md on how to load the export."""
    if job.r4:
        return [
            "**Only `dist_spin.load` loads this model.** Its down_proj weights expect an input that is rotated online by the",
            "Hadamard R4. A bare `from_pretrained` would give wrong outputs without an error, so config.json carries a model",
            "type that other programs refuse, and down_proj has a name of its own, with nothing under the usual one.",
            "",
            LOAD_EXAMPLE,
        ]
    lines = [
        f"Any program that loads the format: {MERGED[job.config.rotation.r1]} of the weights, nothing has to be rotated online.",
    ]
    if takes_activation(job.files.config):
        command = serve_command("PATH OF THIS DIRECTORY", {}, Sites())
        engine = tried_engine(job.files.config)
        how = f"serves it with {engine}." if engine else "is vLLM's command for it, not tried with this family."
        lines += ["", f"    {command}", "", how]
    if job.quantisers:
        lines += [
            "Quantisers of activations, keys and values, as they were learned with, are put back by",
            "",
            LOAD_EXAMPLE,
        ]
    return lines


FORMAT = ExportFormat(prepare, loading)
