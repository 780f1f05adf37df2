"""A writer for each export format."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dist_spin.export.checkpoint import copy_tokenizer, hide_from_others, rename_down
from dist_spin.export.compressed import config_entries, online_tensors, packed_layer
from dist_spin.export.executorch import loader_settings, write_executorch
from dist_spin.export.export_job import ExportJob
from dist_spin.export.gguf import Converter
from dist_spin.export.sidecar import NAME
from dist_spin.pipeline.export_limits import model_params
from dist_spin.pipeline.model import model_dtype
from dist_spin.storage.atomic import write_json


def _hf(job: ExportJob) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        extra = hide_from_others(job.files) if job.r4 else {}
        rename = rename_down if job.r4 else dict
        job.checkpoint(directory, lambda index: rename(job.weights.layer(index)), extra)
        job.sidecar(directory)

    return write


def _compressed_tensors(job: ExportJob) -> Callable[[Path], None]:
    first = job.quantised_layer(0)
    about = config_entries(job.sites, first.bits, first.symmetric, first.group_size)
    shared = online_tensors(job.sites)

    def layer(index: int) -> dict[str, Tensor]:
        return packed_layer(job.quantised_layer(index), model_dtype(job.config)) | (shared if index == 0 else {})

    def write(directory: Path) -> None:
        job.checkpoint(directory, layer, {"quantization_config": about})
        job.sidecar(directory)

    return write


def _executorch(job: ExportJob) -> Callable[[Path], None]:
    q, embeddings = job.config.quant, job.quantised_embeddings()
    params = model_params(job.files.config, q.w_group_size)

    def write(directory: Path) -> None:
        write_executorch(
            directory,
            params,
            layer=job.quantised_layer,
            embedding=lambda: embeddings.get("embedding") or job.weights.embedding(),
            head=lambda: embeddings.get("head") or job.weights.head_weight(),
            between=job.between(),
        )
        copy_tokenizer(job.files, directory)
        about = {"format": "executorch", "profile": job.config.export.profile, "fingerprint": job.fingerprint}
        settings = loader_settings(set(embeddings), q.w_group_size, job.r4)
        write_json(directory / NAME, about | {"llm_config": settings})

    return write


def _gguf(job: ExportJob) -> Callable[[Path], None]:
    converter = Converter.find(job.config.export.gguf_converter)

    def write(directory: Path) -> None:
        merged = directory / "merged"
        merged.mkdir()
        job.checkpoint(merged, job.weights.layer, {})
        converter.convert(merged, directory / f"{job.config.name}.gguf", job.config.model.dtype)
        shutil.rmtree(merged)
        about = {"format": "gguf", "profile": job.config.export.profile, "fingerprint": job.fingerprint}
        write_json(directory / NAME, about)

    return write
