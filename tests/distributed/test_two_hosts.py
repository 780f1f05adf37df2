"""Two hosts as two network namespaces joined by a cable, which is cut while they learn."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.harness import Run
from tests.tiny import write_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(240)]
ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 12  # seconds that a rank waits for another


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Namespace -> its network interface."""
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces: run it as root, with iproute2 installed", pytrace=False)
    tag = f"ds{os.getpid() % 100000}"
    names = {f"{tag}a": f"{tag}va", f"{tag}b": f"{tag}vb"}
    (a, va), (b, vb) = names.items()
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", va, "netns", a, "type", "veth", "peer", "name", vb, "netns", b)
        for number, (name, link) in enumerate(names.items(), start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(hosts: dict[str, str], run: Run, logs: Path, *more: str) -> list["subprocess.Popen[bytes]"]:
    processes = []
    for name, link in hosts.items():
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": link, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with (logs / name).open("ab") as log:
            words = ["launch/torchrun.sh", "10.77.0.1", "2", "1", "optimize", str(run.config), *more]
            command = ["ip", "netns", "exec", name, *words]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return processes


def test_cable_cut_while_learning(hosts: dict[str, str], tmp_path: Path) -> None:
    model = write_model("gqa_tied", tmp_path / "model")
    run = Run(tmp_path, model, optimize__steps=60, distributed__timeout_s=TIMEOUT)

    def say() -> str:
        return "".join(f"{name}:\n{(tmp_path / name).read_text()}\n" for name in hosts)

    processes = start(hosts, run, tmp_path)
    deadline = time.monotonic() + 100
    while run.step < 2:
        assert time.monotonic() < deadline, say()
        time.sleep(0.1)
    last, link = list(hosts.items())[1]
    ip("-n", last, "link", "set", link, "down")
    cut = time.monotonic()
    codes = [process.wait(60) for process in processes]
    assert time.monotonic() - cut < TIMEOUT + 45, say()  # and not the ten minutes that torchrun would take
    assert codes == [4, 4], say()
    reached = run.step
    assert reached < 60
    first = (tmp_path / next(iter(hosts))).read_text()
    # In the step after the last one that was saved, or in telling the other rank that this one was.
    where = f"no answer from another rank within {TIMEOUT} s at learn rotations: step"
    assert any(f"{where} {step} of 60" in first for step in (reached, reached + 1)), first
    assert "Traceback" not in say()

    ip("-n", last, "link", "set", link, "up")
    # On a busy machine one rank may have imported everything long before the other.
    again = start(hosts, run, tmp_path, "distributed.timeout_s=60")
    assert [process.wait(120) for process in again] == [0, 0], say()
    assert [(event["step"], event["ranks"]) for event in run.events("resume")] == [(reached, 2)]
    assert (run.path / "rotations" / "final.safetensors").exists()
