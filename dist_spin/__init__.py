"""Learned rotations and 4-bit quantisation of large language models on the cluster you already have."""

from pathlib import Path
from typing import Any

from dist_spin.version import __version__ as __version__


def load(path: str | Path, device: str = "auto") -> Any:
    """An exported model as a transformers model that does what the run measured: see `dist_spin.export.loader.load`.

    Args:
        path: a directory that `dist-spin export` wrote. device: where all of it goes; "auto" takes CUDA where there is one.
    """
    from dist_spin.export.loader import load  # late: it takes torch and transformers, and `dist-spin --help` neither

    return load(path, device)
