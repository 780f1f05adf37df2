"""The example configurations and Slurm scripts that come with the package: `configs/` and `slurm/` of the repository."""

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable

from dist_spin.config.checks import one_line
from dist_spin.errors import UserError


def examples() -> dict[str, Traversable]:
    """Name -> YAML file: `quickstart` and its neighbours first, then the published models, such as `llama-3.1-70b`, then the
    recipes of serving engines, such as `w8a8`."""
    top = bundled("configs")
    return _yaml_files(top) | _yaml_files(top / "recipes") | _yaml_files(top / "serve")


def example(name: str) -> str:
    """The text of an example, called as in `examples`, or by its path such as `configs/recipes/llama-3-8b.yaml`.

    Raises:
        UserError: there is no example of that name.
    """
    known = examples()
    stem = name.rpartition("/")[2].removesuffix(".yaml")
    if stem not in known:
        close = difflib.get_close_matches(stem, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no example called {one_line(name)}", f"{hint}use one of {', '.join(known)}")
    return known[stem].read_text(encoding="utf-8")


def bundled(folder: str) -> Traversable:
    """`configs` or `slurm`, as it was installed; in a checkout, the folder at the top."""
    return files("dist_spin") / folder


def _yaml_files(folder: Traversable) -> dict[str, Traversable]:
    found = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return dict(sorted(found.items()))
