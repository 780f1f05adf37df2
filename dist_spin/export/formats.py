"""A writer for each export format."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dist_spin.export.checkpoint import copy_tokenizer, hide_from_others, rename_down
from dist_spin.export.compressed import config_entries, online_tensors, packed_layer
from dist_spin.export.executorch import loader_settings, write_executorch
from dist_spin.export.export_job import Export
from dist_spin.export.gguf import Converter
from dist_spin.export.sidecar import NAME
from dist_spin.pipeline.export_limits import model_params
from dist_spin.pipeline.model import model_dtype
from dist_spin.storage.atomic import write_json


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
