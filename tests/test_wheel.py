"""What people install: the wheel holds every module and template under the one name dist_spin, and works without the tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, as site-packages would have it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("dist_spin", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-q", "-w", str(target), str(source)], check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    wheel.unlink()
    return target


def test_every_module_and_template_is_in_it_under_one_name(installed: Path) -> None:
    assert [p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")] == ["dist_spin"]
    for tree, package in (("dist_spin", "dist_spin"), ("launch", "dist_spin/launch")):
        for path in (ROOT / tree).rglob("*"):
            if path.suffix in (".py", ".jinja", ".typed"):
                assert (installed / package / path.relative_to(ROOT / tree)).read_bytes() == path.read_bytes()


def test_it_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    code = "import dist_spin.launch.fanout as f, dist_spin; print(f.__file__, dist_spin.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(name.startswith(str(installed)) for name in run.stdout.split())
    command = [sys.executable, "-m", "dist_spin", "status", str(tmp_path / "none")]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("dist-spin: ")
