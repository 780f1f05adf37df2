"""What people install: the wheel holds code, templates and examples under the one name dist_spin, and works without the tree."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dist_spin.config.examples import example, examples
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, as site-packages would have it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("dist_spin", "launch", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-q", "-w", str(target), str(source)], check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        for member in archive.infolist():  # as pip does
            (target / member.filename).chmod(0o755 if member.external_attr >> 16 & 0o111 else 0o644)
    wheel.unlink()
    return target


def test_every_module_and_template_is_in_it_under_one_name(installed: Path) -> None:
    assert [p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")] == ["dist_spin"]
    for tree, package in (("dist_spin", "dist_spin"), ("launch", "dist_spin/launch")):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".py", ".jinja", ".typed"):
                assert (installed / package / path.relative_to(ROOT / tree)).read_bytes() == path.read_bytes()


def test_every_configuration_and_slurm_script_is_in_it(installed: Path) -> None:
    files = [path for tree in ("configs", "slurm") for path in (ROOT / tree).rglob("*") if path.is_file()]
    assert len(files) > 18
    for path in files:
        copy = installed / "dist_spin" / path.relative_to(ROOT)
        assert copy.read_bytes() == path.read_bytes()
        assert os.access(copy, os.X_OK) == os.access(path, os.X_OK)


def test_files_that_name_the_version_name_this_one() -> None:
    named = {
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## \[(\d\S+)\] - ",
        "containers/dist_spin.def": r"^    Version (\S+)$",
        "README.md": r"dist_spin-(\d\S+?)-py3-none-any\.whl",
        "docs/getting-started.md": r"dist_spin-(\d\S+?)-py3-none-any\.whl",
    }
    found = {path: re.findall(names, (ROOT / path).read_text(), re.M)[:1] for path, names in named.items()}
    assert found == {path: [__version__] for path in named}


@pytest.mark.parametrize("name", examples())
def test_an_example_is_called_as_its_file_and_loads(name: str, tmp_path: Path) -> None:
    text = example(name)
    (tmp_path / "my.yaml").write_text(text)
    (path,) = (path for path in (ROOT / "configs").rglob("*.yaml") if path.stem == name)
    assert text == path.read_text() == example(str(path.relative_to(ROOT)))
    assert load_config(str(tmp_path / "my.yaml"), []).model.path


def test_an_example_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(
        UserError, match=r"no example called quikstart; did you mean quickstart\? use one of accurate, "
    ):
        example("quikstart")
    with pytest.raises(UserError, match=r"no example called \.\./\.\./etc/passwd; use one of"):
        example("../../etc/passwd")


@pytest.mark.slow
def test_it_works_away_from_the_tree_and_without_what_extras_install(installed: Path, tmp_path: Path) -> None:
    # None in sys.modules makes an import fail as it does where nothing is installed.
    extras = "deepspeed executorch fast_hadamard_transform lm_eval mkdocs playwright pytest torchao xllamacpp"
    modules = sorted(
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in installed.glob("dist_spin/**/*.py")
    )
    code = f"""
import importlib, sys
sys.modules |= dict.fromkeys({extras.split()})
for name in {modules}:
    if name != "dist_spin.__main__" and ".triton_" not in name:  # runs; need triton, which CPU builds lack
        try:
            print(importlib.import_module(name).__file__)
        except Exception as error:
            print(name, error, file=sys.stderr)
from dist_spin.config.examples import examples
print(*examples().values())"""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    (refused,) = [line for line in imported.stderr.splitlines() if line.startswith("dist_spin.")]
    assert refused.startswith("dist_spin.evaluate.zero_shot evaluate.tasks needs lm-evaluation-harness")
    assert refused.endswith("pip install 'dist-spin[lm-eval]'")
    assert len(imported.stdout.split()) == len(modules) - 4 + len(examples())
    assert all(path.startswith(str(installed)) for path in imported.stdout.split())
    command = [sys.executable, "-m", "dist_spin", "status", str(tmp_path / "none")]
    refusal = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refusal.returncode == 2
    assert refusal.stderr.startswith("dist-spin: ")
