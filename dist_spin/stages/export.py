"""Write a run's model for another program, layer by layer; the directory appears when it is complete.

    dist-spin export runs/NAME --format compressed-tensors
    dist-spin export CONFIG.yaml --format gguf --output DIR export.gguf_converter=download

The run must be one: rotations, layers and model of another making are refused, and nothing of the run is changed.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin import __version__
from dist_spin.distributed import World
from dist_spin.errors import Interrupted, UserError
from dist_spin.export.card import model_card
from dist_spin.export.checkpoint import copy_tokenizer, hide_from_others, rename_down, write_checkpoint
from dist_spin.export.compressed import config_entries, online_tensors, packed_layer
from dist_spin.export.directory import whole_directory
from dist_spin.export.executorch import loader_settings, model_params, write_executorch
from dist_spin.export.gguf import Converter
from dist_spin.export.sidecar import NAME, Sidecar, read_sidecar, write_sidecar
from dist_spin.export.target import QUANTISED, check_clips, check_target
from dist_spin.layer_files import FOREIGN, QuantizedLayer, identity_hash, layer_path, load_ends, load_layer
from dist_spin.model.layers import RotatedWeights
from dist_spin.model.loading import ModelFiles
from dist_spin.model.rotation import Sites
from dist_spin.numerics.gptq import Solution
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.progress import Progress
from dist_spin.rundir import CorruptFile, RunDir, read_metadata, write_json, write_text
from dist_spin.settings import RunConfig
from dist_spin.signals import StopRequest
from dist_spin.stages.common import WEIGHT_SETTINGS, flat, model_dtype, open_configured_model, run_dir, say
from dist_spin.stages.variants import LEARNED, Variant, calibration_tokens, ends_of, layer_identity, variant

AGAIN = "run `dist-spin quantize` with the settings of this export"


def export(config: RunConfig, world: World, target: str, output: Path | None = None) -> Path:
    """Write the learned model in the format `target` to `output` (default: RUN/export/FORMAT); returns the directory.

    Raises:
        Interrupted: a signal came; nothing is left of the attempt.
        UserError: the format has no place for the run's settings, or the run is incomplete, damaged or mixed.
    """
    if world.size > 1:
        raise UserError("export is the work of one process", "start it without torchrun")
    stop = StopRequest()
    files = open_configured_model(config)
    check_target(target, config, files.config, starting=False)
    run = run_dir(config)
    place = output or run.export / target
    learned = variant(config, files, LEARNED, world.device)
    check_clips(target, config, learned.sites.clips is not None)
    work = Export(config, run, files, learned, target, stop)
    work.check_run()
    if finished(place, work.made_under):
        say(f"{place} is complete")
        return place
    if place.exists() and not (place / NAME).exists():
        raise UserError(f"{place} exists and is no export", "give another --output, or remove it")
    writers = {"hf": _hf, "compressed-tensors": _compressed_tensors, "gguf": _gguf, "executorch": _executorch}
    write = writers[target](work)
    with whole_directory(place) as partial:
        write(partial)
        for name in ("final.safetensors", "R.bin"):
            (partial / "dist_spin").mkdir(exist_ok=True)
            shutil.copyfile(run.rotations / name, partial / "dist_spin" / name)
        write_text(partial / "README.md", work.card())
    run.event("export", format=target, path=str(place))
    say(f"wrote {place}")
    if work.sites.r4:
        who = "ExecuTorch's use_spin_quant applies it" if target == "executorch" else "dist_spin.load applies it"
        say(f"R4 is online: {who}, transformers' from_pretrained stops with an error; README.md there says more")
    return place


def finished(place: Path, made_under: str) -> bool:
    """Whether a whole export of the same content is there."""
    try:
        about = json.loads((place / NAME).read_text())
        if about["format"] not in ("gguf", "executorch"):
            read_sidecar(place)
        return about["made_under"] == made_under
    except (OSError, ValueError, KeyError, UserError):
        return False


@dataclass
class Export:
    """One export: what is read of the run, and checked."""

    config: RunConfig
    run: RunDir
    files: ModelFiles
    chosen: Variant
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

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """What `evaluate` measured."""
        path = self.run.path / "results.json"
        return json.loads(path.read_text()) if path.exists() else []

    @property
    def sites(self) -> Sites:
        """What happens online in the exported model; nothing where R4 was learned with and is left out."""
        return Sites() if self.config.rotation.online and not self.r4 else self.chosen.sites

    @cached_property
    def weights(self) -> RotatedWeights:
        """The merged 16-bit weights, with or without R4."""
        made = self.chosen.weights
        r4 = self.sites.r4
        return RotatedWeights(made.source, made.shape, made.rotations, r4, made.device, made.dtype, scales=made.scales)

    @cached_property
    def layers_made_under(self) -> str:
        """The fingerprint that every quantised layer must carry."""
        tokens = calibration_tokens(self.config, self.files)
        return identity_hash(layer_identity(self.config, self.files, self.chosen, tokens))

    @cached_property
    def made_under(self) -> str:
        """A hash of everything that decides the export's content."""
        without_tokens = torch.zeros(1, 1, dtype=torch.long)
        model = layer_identity(self.config, self.files, self.chosen, without_tokens)
        ends = ends_of(self.config, self.files, self.chosen).made_under if self.quantised else ""
        ours = {
            "format": self.target,
            "profile": self.config.export.profile,
            "shard_gb": self.config.export.shard_gb,
            "layers": self.quantised and self.layers_made_under,
            "ends": ends,
            "results": self.results,  # the card tells them
            "dist_spin": __version__,
        }
        return identity_hash(model | ours)

    def check_run(self) -> None:
        """Refuse a run that was learned on another model or for other sites, or whose layers are not all of one making.

        Raises:
            UserError: names the first thing that does not fit.
        """
        fingerprint = self.run.path / "fingerprint.json"
        started = json.loads(fingerprint.read_text()) if fingerprint.exists() else {}
        sites = {k: v for k, v in flat(self.config.quant, "quant").items() if not k.startswith(WEIGHT_SETTINGS)}
        now = {"model weights": self.files.weights.fingerprint(), **flat(self.config.rotation, "rotation"), **sites}
        for name, value in now.items():
            if started.get(name, value) != value:
                problem = f"run {self.config.name} was learned with {name} = {started[name]!r}, not {value!r}"
                raise UserError(problem, f"set {name} back" if "." in name else "set model.path back")
        for index in range(self.files.shape.layers) if self.quantised else ():
            path = layer_path(self.run.layers(), index)
            metadata = read_metadata(path)
            if metadata is None:
                what = "cannot be read" if path.exists() else "is missing"
                raise UserError(f"{path} {what}", AGAIN)
            if metadata.get("fingerprint") != self.layers_made_under:
                raise UserError(f"{path} {FOREIGN}", AGAIN)

    def quantised_layer(self, index: int) -> QuantizedLayer:
        """Layer `index` of the run, its checksum and fingerprint checked.

        Raises:
            UserError: it cannot be used.
        """
        path = layer_path(self.run.layers(), index)
        try:
            layer, made_under = load_layer(path)
        except CorruptFile as error:
            raise UserError(str(error), AGAIN) from error
        if made_under != self.layers_made_under:
            raise UserError(f"{path} {FOREIGN}", AGAIN)
        return layer

    def quantised_ends(self) -> dict[str, Solution]:
        """The quantised ones of `embedding` and `head`, each [vocab, h].

        Raises:
            UserError: they should be there and are not, or cannot be used.
        """
        ends = ends_of(self.config, self.files, self.chosen)
        if not (self.quantised and ends.bits):
            return {}
        try:
            found, made_under = load_ends(ends.path)
        except CorruptFile as error:
            raise UserError(str(error), AGAIN) from error
        if made_under != ends.made_under:
            raise UserError(f"{ends.path} {FOREIGN}", AGAIN)
        return found

    def between(self) -> Callable[[int], None]:
        """What is to be called before each layer: shows progress, and leaves where a signal came."""
        progress = Progress(f"export {self.target}: layer", self.files.shape.layers)

        def between(index: int) -> None:
            if self.stop:
                raise Interrupted(f"stopped by a signal before layer {index}", "the same command starts again")
            progress.advance()

        return between

    def checkpoint(self, directory: Path, layer: Callable[[int], dict[str, Tensor]], extra: dict[str, Any]) -> None:
        """Write weights, config and tokenizer to `directory`; see `write_checkpoint`."""
        dtype = self.weights.dtype
        ends = {end: dequantize_weight(*solution, dtype=dtype) for end, solution in self.quantised_ends().items()}
        write_checkpoint(
            directory,
            self.files,
            dtype,
            layer=layer,
            embedding=lambda: ends["embedding"] if "embedding" in ends else self.weights.embedding(),
            head=lambda: ends["head"] if "head" in ends else self.weights.head_weight(),
            extra=extra,
            shard_bytes=self.config.export.shard_gb * 1e9,
            between=self.between(),
        )

    def sidecar(self, directory: Path) -> None:
        """Write what `dist_spin.load` needs beside the weights."""
        kind, dtype = self.files.config.model_type, self.config.model.dtype
        profile = self.config.export.profile
        write_sidecar(directory, Sidecar(self.target, profile, kind, dtype, self.made_under, self.sites))

    def card(self) -> str:
        """The text of README.md."""
        metadata = read_metadata(self.run.rotations / "final.safetensors") or {}
        return model_card(
            self.config,
            self.target,
            r4=bool(self.sites.r4),
            quantisers=any(spec.enabled for spec in (self.sites.a, self.sites.o, self.sites.k, self.sites.v)),
            scales=bool(self.weights.scales),
            clips=self.sites.clips is not None and self.target != "gguf",
            step=metadata.get("step", "?"),
            results=self.results,
        )


def _hf(work: Export) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        extra = hide_from_others(work.files) if work.r4 else {}
        rename = rename_down if work.r4 else dict
        work.checkpoint(directory, lambda index: rename(work.weights.layer(index)), extra)
        work.sidecar(directory)

    return write


def _compressed_tensors(work: Export) -> Callable[[Path], None]:
    first = work.quantised_layer(0)
    about = config_entries(work.sites, first.bits, first.symmetric, first.group_size)
    shared = online_tensors(work.sites)

    def layer(index: int) -> dict[str, Tensor]:
        return packed_layer(work.quantised_layer(index), model_dtype(work.config)) | (shared if index == 0 else {})

    def write(directory: Path) -> None:
        work.checkpoint(directory, layer, {"quantization_config": about})
        work.sidecar(directory)

    return write


def _executorch(work: Export) -> Callable[[Path], None]:
    q, ends = work.config.quant, work.quantised_ends()
    params = model_params(work.files.config, q.w_group_size)

    def write(directory: Path) -> None:
        write_executorch(
            directory,
            params,
            layer=work.quantised_layer,
            embedding=lambda: ends.get("embedding") or work.weights.embedding(),
            head=lambda: ends.get("head") or work.weights.head_weight(),
            between=work.between(),
        )
        copy_tokenizer(work.files, directory)
        about = {"format": "executorch", "profile": work.config.export.profile, "made_under": work.made_under}
        settings = loader_settings(set(ends), q.w_group_size, work.r4)
        write_json(directory / NAME, about | {"llm_config": settings})

    return write


def _gguf(work: Export) -> Callable[[Path], None]:
    converter = Converter.find(work.config.export.gguf_converter)

    def write(directory: Path) -> None:
        merged = directory / "merged"
        merged.mkdir()
        work.checkpoint(merged, work.weights.layer, {})
        converter.convert(merged, directory / f"{work.config.name}.gguf", work.config.model.dtype)
        shutil.rmtree(merged)
        about = {"format": "gguf", "profile": work.config.export.profile, "made_under": work.made_under}
        write_json(directory / NAME, about)

    return write
