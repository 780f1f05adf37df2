"""What an export format is, and one export: what is read of the run, checked, and written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.export.checkpoint import write_checkpoint
from dist_spin.export.sidecar import Sidecar, write_sidecar
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles
from dist_spin.numerics.gptq import QuantizedWeight
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.embeddings import embeddings_of, quantized_embedding_bits
from dist_spin.pipeline.export_limits import QUANTISED
from dist_spin.pipeline.fingerprints import WEIGHT_SETTINGS, flat, layer_fingerprint, layer_identity
from dist_spin.pipeline.variants import Variant, calibration_tokens
from dist_spin.runtime.progress import Progress, warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.quantized_layers import QuantizedLayer, layer_path, load_embeddings, load_layer
from dist_spin.storage.results import FIDELITY, load_results
from dist_spin.storage.run_directory import LEARNED, RunDir, read_fingerprint
from dist_spin.storage.tensor_file import FOREIGN, CorruptFile, identity_hash, read_metadata
from dist_spin.version import __version__

DirectoryWriter = Callable[[Path], None]  # writes an export's own files into an empty directory
# What the card tells of a measurement; seconds and other figures of how it was made decide nothing.
FORMAT_SETTINGS = ("w_format", "a_format", "kv_format")  # in a row where they are not int
CARD_FIGURES = ("dataset", "w_bits", "a_bits", "k_bits", "v_bits", "method", "weights", "ppl")
CARD_EXTRAS = {"layers", *FORMAT_SETTINGS, *(figure.name for figure in FIDELITY)}  # of rows that have them
CARD_GREEDY = {"prompts", *CARD_FIGURES[1:-1], *FORMAT_SETTINGS, "layers", "n", "prompt_tokens"}
CARD_GREEDY |= {"greedy_first", "greedy_equal"}
REQUANTIZE = "run `dist-spin quantize` with the settings of this export"


@dataclass
class ExportJob:
    """One export: what is read of the run, and checked."""

    config: RunConfig
    run: RunDir
    files: ModelFiles
    variant: Variant
    target: str
    stop: StopRequest

    @property
    def r4(self) -> bool:
        """Whether R4 is part of the exported weights."""
        return self.config.export.profile == "r4-block"

    @property
    def quantised(self) -> bool:
        """Whether weights come from the quantised layers."""
        return self.target in QUANTISED

    @property
    def quantisers(self) -> bool:
        """Whether activations, keys or values are quantised at run time."""
        return any(spec.enabled for spec in (self.sites.a, self.sites.o, self.sites.k, self.sites.v))

    @property
    def steps_learned(self) -> str:
        """How many steps the rotations were learned for, as their file says; "?" where it does not."""
        metadata = read_metadata(self.run.rotations / "final.safetensors") or {}
        return metadata.get("step", "?")

    @property
    def description(self) -> dict[str, Any]:
        """What dist_spin.json says of every export."""
        return {"format": self.target, "profile": self.config.export.profile, "fingerprint": self.fingerprint}

    @property
    def results(self) -> list[dict[str, Any]]:
        """The perplexities that were measured, by `evaluate` or in a comparison."""
        return [row for row in self._rows if "ppl" in row]

    @property
    def greedy(self) -> list[dict[str, Any]]:
        """How continuations of prompts agreed with those of full precision, as `evaluate` measured it."""
        return [row for row in self._rows if "prompts" in row]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return load_results(self.run, warn)

    def measured_here(self, row: dict[str, Any]) -> bool:
        """Whether a row of the results is of this export's own weights and quantisers, as `dist_spin.load` puts them back."""
        q = self.config.quant
        same = {f"{s}_bits": getattr(q, f"{s}_bits") for s in "akv"} | {"rotation": LEARNED}
        if any(row.get(name, "int") != getattr(q, name) for name in FORMAT_SETTINGS[1:]):
            return False
        if any(row.get(name) != value for name, value in same.items()) or (self.config.rotation.online and not self.r4):
            return False
        if self.target == "compressed-tensors":
            return bool(row.get("layers") == self.layers_fingerprint)
        return self.target == "hf" and row["weights"] == "none" and "system" not in row

    @property
    def sites(self) -> Sites:
        """What happens online in the exported model; nothing where R4 was learned with and is left out."""
        return Sites() if self.config.rotation.online and not self.r4 else self.variant.sites

    @cached_property
    def weights(self) -> RotatedWeights:
        """The merged 16-bit weights, with or without R4."""
        w = self.variant.weights
        return RotatedWeights(w.source, w.shape, w.rotations, self.sites.r4, w.device, w.dtype, scales=w.scales)

    @cached_property
    def layers_fingerprint(self) -> str:
        """The fingerprint that every quantised layer must carry."""
        tokens = calibration_tokens(self.config, self.files)
        return layer_fingerprint(self.config, self.files, self.variant, tokens)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the export's content."""
        without_tokens = torch.zeros(1, 1, dtype=torch.long)
        model = layer_identity(self.config, self.files, self.variant, without_tokens)
        embeddings = embeddings_of(self.config, self.files, self.variant).fingerprint if self.quantised else ""
        export = {
            "format": self.target,
            "profile": self.config.export.profile,
            "shard_gb": self.config.export.shard_gb,
            "layers": self.quantised and self.layers_fingerprint,
            "ends": embeddings,
            "results": [
                {name: row.get(name) for name in CARD_FIGURES} | {k: v for k, v in row.items() if k in CARD_EXTRAS}
                for row in self.results
            ],
            "dist_spin": __version__,
        }
        if self.greedy:  # exports of runs without prompts keep their fingerprint
            export["greedy"] = [{k: v for k, v in row.items() if k in CARD_GREEDY} for row in self.greedy]
        return identity_hash(model | export)

    def check_run(self) -> None:
        """Refuse a run that was learned on another model or for other sites, or whose layers are not all of one making.

        Raises:
            UserError: names the first thing that does not fit.
        """
        fingerprint = read_fingerprint(self.run.path / "fingerprint.json") or {}
        sites = {k: v for k, v in flat(self.config.quant, "quant").items() if not k.startswith(WEIGHT_SETTINGS)}
        current = {"model weights": self.files.weights.fingerprint(), **flat(self.config.rotation, "rotation"), **sites}
        for name, value in current.items():
            if fingerprint.get(name, value) != value:
                problem = f"run {self.config.name} was learned with {name} = {fingerprint[name]!r}, not {value!r}"
                raise UserError(problem, f"set {name} back" if "." in name else "set model.path back")
        for index in range(self.files.shape.layers) if self.quantised else ():
            path = layer_path(self.run.layers(), index)
            metadata = read_metadata(path)
            if metadata is None:
                fault = "cannot be read" if path.exists() else "is missing"
                raise UserError(f"{path} {fault}", REQUANTIZE)
            if metadata.get("fingerprint") != self.layers_fingerprint:
                raise UserError(f"{path} {FOREIGN}", REQUANTIZE)

    def quantised_layer(self, index: int) -> QuantizedLayer:
        """Layer `index` of the run, on the device, its checksum and fingerprint checked.

        Raises:
            UserError: it cannot be used.
        """
        path = layer_path(self.run.layers(), index)
        try:
            layer, fingerprint = load_layer(path, self.weights.device)
        except CorruptFile as error:
            raise UserError(str(error), REQUANTIZE) from error
        if fingerprint != self.layers_fingerprint:
            raise UserError(f"{path} {FOREIGN}", REQUANTIZE)
        return layer

    def quantised_embeddings(self) -> dict[str, QuantizedWeight]:
        """The quantised ones of `embedding` and `head`, each [vocab, h].

        Raises:
            UserError: they should be there and are not, or cannot be used.
        """
        embeddings = embeddings_of(self.config, self.files, self.variant)
        if not (self.quantised and embeddings.bits):
            return {}
        try:
            weights, fingerprint = load_embeddings(embeddings.path)
        except CorruptFile as error:
            raise UserError(str(error), REQUANTIZE) from error
        if fingerprint != embeddings.fingerprint:
            raise UserError(f"{embeddings.path} {FOREIGN}", REQUANTIZE)
        return weights

    def before_layer(self) -> Callable[[int], None]:
        """What a writer calls before each layer, with its number: shows progress, and leaves where a signal came."""
        progress = Progress(f"export {self.target}: layer", self.files.shape.layers)

        def advance(index: int) -> None:
            if self.stop:
                raise Interrupted(f"stopped by a signal before layer {index}", "the same command starts again")
            progress.advance()

        return advance

    def write_checkpoint(
        self, directory: Path, layer: Callable[[int], dict[str, Tensor]], extra: dict[str, Any]
    ) -> None:
        """Write weights, config and tokenizer to `directory`; see `write_checkpoint`."""
        dtype = self.weights.dtype
        embeddings = {
            name: dequantize_weight(*quantized, dtype=dtype) for name, quantized in self.quantised_embeddings().items()
        }
        final_gain, bits = self.weights.final_gain(), quantized_embedding_bits(self.config) if self.quantised else {}
        # Engines know some families with tied embeddings alone.
        tied = final_gain is not None and self.files.config.tie_word_embeddings
        tied = tied and bits.get("embedding") == bits.get("head")
        write_checkpoint(
            directory,
            self.files,
            dtype,
            device=self.weights.device,
            layer=layer,
            embedding=lambda: embeddings["embedding"] if "embedding" in embeddings else self.weights.embedding(),
            head=None if tied else lambda: embeddings["head"] if "head" in embeddings else self.weights.head_weight(),
            final_gain=final_gain,
            extra=extra,
            shard_bytes=self.config.export.shard_gb * 1e9,
            before_layer=self.before_layer(),
        )

    def write_sidecar(self, directory: Path) -> None:
        """Write what `dist_spin.load` needs beside the weights."""
        kind, dtype = self.files.config.model_type, dtype_name(self.config)
        profile = self.config.export.profile
        write_sidecar(directory, Sidecar(self.target, profile, kind, dtype, self.fingerprint, self.sites))


@dataclass(frozen=True)
class ExportFormat:
    """What the file of a format gives to the table in `formats`.

    Args:
        prepare: reads what is needed of the run and refuses what is not right, before a directory is begun; the writer.
        loading: the lines of README.md on how to load the export.
        r4_applied_by: who applies the online R4.
        loads_here: whether `dist_spin.load` reads the format, so that dist_spin.json is checked against the weights.
    """

    prepare: Callable[[ExportJob], DirectoryWriter]
    loading: Callable[[ExportJob], list[str]]
    r4_applied_by: str = "dist_spin.load"
    loads_here: bool = True
