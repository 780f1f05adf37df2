"""Weights from disk in pieces: any part of any tensor without the rest of the model, whatever the source.

A `WeightSource` answers for one Hugging Face directory of safetensors; a hub id is downloaded and a GGUF file converted to
such a directory once. `DummyWeights` answers with seeded random numbers instead, so that shapes run where weights cannot be had.
"""

import dataclasses
import hashlib
import math
import os
import tempfile
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.errors import DamagedWeights, UserError
from dist_spin.model.architecture import EMBEDDING, HEAD, Shape, skeleton
from dist_spin.model.checkpoint_check import check_tensors
from dist_spin.model.checkpoint_headers import (
    DOWNLOAD_AGAIN,
    check_config,
    files_fingerprint,
    first_line,
    gguf_in_package,
    local_directory,
    read_headers,
)
from dist_spin.model.expert_storage import ExpertPart, expert_parts, name_here, stores_interleaved
from dist_spin.model.experts import check_experts
from dist_spin.model.families import FAMILIES, check_flags, check_supported
from dist_spin.model.llama_form import LlamaFormWeights, llama_form
from dist_spin.model.output_norms import name_here as norm_here
from dist_spin.model.tensor_bytes import TensorRange, opened, read_header, read_into
from dist_spin.model.weight_source import WeightSource
from dist_spin.numerics.finite import all_finite, first_not_finite

BASE_PREFIX = "model."
DUMMY_ROW_BLOCK = 256  # rows drawn from one seed, so that any row range can be made without the rows before it


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine: its config, its weights and where its tokenizer lies.

    notes: lines that the user should see once, such as what is taken from elsewhere.
    """

    config: Any
    weights: WeightSource
    directory: Path
    trust_remote_code: bool
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """Sizes read from the config."""
        return Shape.of(self.config)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            UserError: the directory has none.
        """
        return read_tokenizer(self.directory, trust_remote_code=self.trust_remote_code)


def read_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's directory.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"no tokenizer can be read from {directory} ({first_line(error)})",
            "put the tokenizer's files there, or use pre-tokenised data: tokens:PATH.npy",
        ) from error


class SafetensorsWeights:
    """The safetensors shards of a directory, opened lazily; only the bytes asked for are read.

    tensors: what the headers say of each, by the names that the architecture gives them. norms: where the norms of the model's
        family stand (`families.Family.norms`).

    Raises:
        UserError: there are none, or the headers and the index do not fit each other.
        DamagedWeights: from `rows`, where they hold NaN or infinity.
    """

    def __init__(self, directory: Path, norms: str = "before") -> None:
        self.directory = directory
        headers = read_headers(directory)
        # A model saved without its head, or by its inner class, has names without "model."; transformers takes them too.
        prefix = "" if EMBEDDING.removeprefix(BASE_PREFIX) + ".weight" in headers else BASE_PREFIX
        self._stored_name = {
            norm_here(norms, name_here(name if prefix or name.startswith(f"{HEAD}.") else f"{BASE_PREFIX}{name}")): name
            for name in headers
        }
        self.tensors = {name: headers[stored] for name, stored in self._stored_name.items()}
        self._parts: dict[str, ExpertPart] = {}  # of tensors that are stored in one with those of other experts
        self._of_thread = (
            threading.local()
        )  # whose `last` is the last expert's part of such a stack that was read as a whole
        interleaved = stores_interleaved(list(headers))
        for stack, tensor in list(self.tensors.items()):
            parts = expert_parts(stack, tensor.shape, interleaved=interleaved)
            for name, part in parts.items():
                self._parts[name], self._stored_name[name] = part, self._stored_name[stack]
                self.tensors[name] = dataclasses.replace(tensor, shape=part.shape)
            if parts:
                del self.tensors[stack]
        self._ranges: dict[str, dict[str, TensorRange]] = {}  # by file, once it was read from

    def _source_of(self, name: str) -> str:
        # A tied checkpoint stores the embedding once; our models are untied, so lm_head reads the same rows.
        return f"{EMBEDDING}.weight" if name == f"{HEAD}.weight" and name not in self.tensors else name

    def has(self, name: str) -> bool:
        return self._source_of(name) in self.tensors

    def rows(self, name: str, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        source = self._source_of(name)
        if source not in self.tensors:
            raise UserError(f"{self.directory} has no tensor {source}", "check that config.json belongs to the weights")
        path = self.directory / self.tensors[source].file
        try:
            rows = self._read(path, source, slice(start, stop), device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)})", DOWNLOAD_AGAIN) from error
        if rows.is_floating_point() and not all_finite(rows):
            (first, *rest), value = first_not_finite(rows)
            raise DamagedWeights(f"{path}: {source} holds {value} at {[first + start, *rest]}", DOWNLOAD_AGAIN)
        return rows

    def row_count(self, name: str) -> int:
        return self.tensors[self._source_of(name)].shape[0]

    def _read(self, path: Path, name: str, rows: slice, device: torch.device | str) -> Tensor:
        with opened(path) as descriptor:
            if path.name not in self._ranges:
                self._ranges[path.name] = read_header(descriptor)[1]
            stored = self._ranges[path.name][self._stored_name[name]]
            shape, part, first = self.tensors[name].shape, self._parts.get(name), 0
            start, stop, _ = rows.indices(shape[0])
            if part is not None:
                if not part.is_block:
                    expert = self._whole_expert(descriptor, stored, part, name, device)
                    return part.of(expert)[start:stop].clone(memory_format=torch.contiguous_format)
                first = part.expert * stored.shape[1] + part.start
            out = torch.empty(max(0, stop - start), *shape[1:], dtype=stored.dtype, device=device)
            row_bytes = math.prod(shape[1:]) * stored.dtype.itemsize
            read_into(descriptor, [(stored.offset + (first + start) * row_bytes, out)])
        return out

    def _whole_expert(
        self, descriptor: int, stored: TensorRange, part: ExpertPart, name: str, device: torch.device | str
    ) -> Tensor:
        """An expert's part of a stack. The last one is kept: its gate, its up and ranges of their rows are asked for in turn.

        By each thread its own, since a copy to a GPU is awaited by the stream of the thread that asked for it alone.
        """
        key = (self._stored_name[name], part.expert, str(device))
        last, read = getattr(self._of_thread, "last", (None, None))
        if last != key or read is None:
            read = torch.empty(stored.shape[1:], dtype=stored.dtype, device=device)
            read_into(descriptor, [(stored.offset + part.expert * read.nbytes, read)])
            self._of_thread.last = key, read
        return read

    def fingerprint(self) -> str:
        return files_fingerprint(self.directory, {tensor.file for tensor in self.tensors.values()})


class DummyWeights:
    """Seeded random weights of a config's shapes, the same for any split into rows; nothing is read from disk."""

    def __init__(self, config: Any, dtype: torch.dtype, seed: int = 0) -> None:
        self._config, self._dtype, self._seed = config, dtype, seed

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        # When they are asked for: thousands of experts take seconds, and a plan reads no weights.
        return {name: tuple(p.shape) for name, p in skeleton(self._config).named_parameters()}

    def has(self, name: str) -> bool:
        return name in self._shapes

    def rows(self, name: str, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        shape = self._shapes[name]
        stop = shape[0] if stop is None else min(stop, shape[0])
        if len(shape) == 1:  # norm gains near one, biases near zero
            return (torch.ones if "norm" in name else torch.zeros)(shape, dtype=self._dtype, device=device)[start:stop]
        out = torch.empty(stop - start, *shape[1:], dtype=self._dtype, device=device)
        for block in range(start // DUMMY_ROW_BLOCK, -(-stop // DUMMY_ROW_BLOCK)):
            key = hashlib.sha256(f"{self._seed}:{name}:{block}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(key[:7], "big"))
            rows = torch.randn(DUMMY_ROW_BLOCK, *shape[1:], generator=generator, dtype=self._dtype, device=device)
            first, last = block * DUMMY_ROW_BLOCK, min((block + 1) * DUMMY_ROW_BLOCK, stop)
            lo = max(first, start)
            out[lo - start : last - start] = rows[lo - first : last - first]
        return out.mul_(shape[-1] ** -0.5)

    def row_count(self, name: str) -> int:
        return self._shapes[name][0]

    def fingerprint(self) -> str:
        return hashlib.sha256(repr((self._seed, self._dtype, sorted(self._shapes.items()))).encode()).hexdigest()


def open_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    dummy: bool = False,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> ModelFiles:
    """Find a model and open its weights for reading in pieces.

    Args:
        path: a Hugging Face directory, a .gguf file, `package:NAME` (the one .gguf inside an installed Python package),
            or a hub id.
        dtype: what a GGUF file is dequantised to, and what dummy weights are made in.
        dummy: random weights; only config.json is read.
        cache: where converted GGUF models are stored (default ~/.cache/dist_spin).

    Raises:
        UserError: the model is missing, unreadable, gated, of an unsupported architecture or already quantised, or its files
            do not fit its config.
    """
    if path.startswith("package:"):
        path = str(gguf_in_package(path.removeprefix("package:")))
    if path.endswith(".gguf"):
        directory = _converted_gguf(Path(path).expanduser(), dtype, cache or Path.home() / ".cache" / "dist_spin")
    else:
        directory = local_directory(path) or _downloaded(path, revision, config_only=dummy)
    check_config(directory, dummy=dummy)
    config = _read_config(directory, trust_remote_code=trust_remote_code)
    check_supported(config.model_type)
    check_flags(config)
    check_experts(config)
    form = llama_form(config)
    if dummy:
        config = config if form is None else form.config
        return ModelFiles(config, DummyWeights(config, dtype), directory, trust_remote_code)
    weights = SafetensorsWeights(directory, FAMILIES[config.model_type].norms)
    notes = tuple(check_tensors(config, directory, weights.tensors))
    if form is None:
        return ModelFiles(config, weights, directory, trust_remote_code, notes)
    return ModelFiles(form.config, LlamaFormWeights(weights, form), directory, trust_remote_code, notes)


def _read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"{directory}/config.json cannot be read ({first_line(error)})", "check model.path") from error


def _converted_gguf(file: Path, dtype: torch.dtype, cache: Path) -> Path:
    """The directory of safetensors that a GGUF file dequantises to; made once, under a name that its content decides."""
    if not file.is_file():
        raise UserError(f"GGUF file {file} does not exist", "check model.path")
    digest = hashlib.sha256(str(dtype).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(1 << 22))
    digest.update(str(file.stat().st_size).encode())
    target = cache / f"{file.stem}-{digest.hexdigest()[:16]}"
    if (target / "config.json").exists():
        return target
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        check_supported(AutoConfig.from_pretrained(**source).model_type)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} cannot be read as GGUF ({first_line(error)})", "check the file") from error
    # The loader marks the model as quantised, and saving would then write a config that claims GGUF weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=cache))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        os.replace(scratch, target)
    except OSError:  # another process finished first; its directory is the same
        if not (target / "config.json").exists():
            raise
    return target


def _downloaded(hub_id: str, revision: str | None, *, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "tokenizer*", "vocab.*", "merges.txt"] + (
        [] if config_only else ["*.safetensors"]
    )
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"model '{hub_id}' is gated", "accept its licence on the hub, then log in (hf auth login) or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model '{hub_id}' is neither a directory nor a model on the hub that you may see", "check model.path"
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model '{hub_id}' is not a directory here and the hub cannot be reached ({first_line(error)})",
            "set model.path to a local directory or .gguf file",
        ) from error
