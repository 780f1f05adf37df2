"""A private Slurm cluster of virtual nodes on this host, started once for all tests of this folder."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.harness import HERE, Cluster, Run
from tests.tiny import write_model

NODES, CPUS = 3, 2
PROGRAMS = "slurmctld slurmd srun sbatch munged slurmdbd mariadbd"


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports; two test runs on one host begin to look in different places."""
    for first in range(26817 + os.getpid() % 100 * 50, 60000, 50):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS.split() if not shutil.which(program, path=path)]
    if missing or os.geteuid() != 0:
        pytest.fail(f"these tests start a Slurm: run `make system-deps` as root (missing: {missing})", pytrace=False)
    directory = tmp_path_factory.mktemp("slurm")
    for parent in (directory, *directory.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)  # MariaDB runs as a user of its own
    script = str(HERE / "cluster.sh")
    with (directory / "cluster.log").open("w") as log:  # a file, because the daemons keep what they inherit open
        start = ["bash", script, "start", str(directory), str(NODES), str(CPUS), str(free_ports(NODES + 4))]
        done = subprocess.run(start, stdout=log, stderr=subprocess.STDOUT, timeout=120, check=False)
    try:
        if done.returncode:
            pytest.fail(f"the cluster did not start:\n{(directory / 'cluster.log').read_text()}", pytrace=False)
        yield Cluster(directory)
    finally:
        subprocess.run(["bash", script, "stop", str(directory)], timeout=60, check=False)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("gqa_tied", tmp_path_factory.mktemp("model") / "tiny", layers=4)


@pytest.fixture
def make_run(tmp_path: Path, model: Path) -> Callable[..., Run]:
    return lambda **settings: Run(tmp_path, model, **settings)
