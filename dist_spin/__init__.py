"""Learned rotations and 4-bit quantisation of large language models on the cluster you already have.

From Python: `Run` has the stages as methods, `RunConfig` the settings, and `load` gives an exported model. Mistakes are raised
as `dist_spin.errors.UserError`. These names are stable; the modules below may change.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_spin.version import __version__ as __version__

if TYPE_CHECKING:
    from dist_spin.api import LearnedRotations, Run, Table
    from dist_spin.config.run import RunConfig

__all__ = ["LearnedRotations", "Run", "RunConfig", "Table", "__version__", "load"]


def load(path: str | Path, device: str = "auto") -> Any:
    """An exported model as a transformers model that does what the run measured: see `dist_spin.export.loader.load`.

    Args:
        path: a directory that `dist-spin export` wrote. device: where all of it goes; "auto" takes CUDA where there is one.
    """
    from dist_spin.export.loader import load  # late: it takes torch and transformers, and `dist-spin --help` neither

    return load(path, device)


def __getattr__(name: str) -> Any:
    """The other public names, imported when they are first used, so that `import dist_spin` stays light."""
    if name == "RunConfig":
        from dist_spin.config.run import RunConfig

        return RunConfig
    if name in __all__:
        from dist_spin import api

        return getattr(api, name)
    raise AttributeError(f"module 'dist_spin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
