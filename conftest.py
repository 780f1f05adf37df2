"""How the tests are spread over pytest-xdist's workers, and which are skipped on this machine."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSER = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
BROWSER += ("--disable-sync", "--no-first-run")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Signals that nohup (SIGHUP) and a script's `&` (SIGINT) ignore reach what the tests start: a handler is not inherited."""
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(reporter))


class FailuresAtOnce:
    """Names each failed test when it fails: a run that its time limit cuts off never reaches pytest's summary."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called in the controller for each phase of each test, from whichever worker it comes."""
        if report.failed:
            self.reporter.ensure_newline()
            self.reporter.write_line(f"FAILED {report.nodeid} in {report.when} after {report.duration:.0f} s")
            self.reporter.write_line("\n".join(report.longreprtext.splitlines()[-5:]))


def pytest_report_header() -> str:
    """Which engine the `vllm` tests will start."""
    found = sorted(Path(__file__).parent.glob(".vllm/lib/python*/site-packages/vllm*.dist-info"))
    return f"engine: {found[0].name.removesuffix('.dist-info')}" if found else "engine: none (make vllm-venv)"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Skip `gpu` tests where there is no GPU; choose the worker of each test (`--dist loadgroup`).

    Tests that start processes of their own (`distributed`, `slurm`) share one group, so that two of them never compete
    for the machine. Every other file is a group, so that its module fixtures are built once.
    """
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    alone = item.get_closest_marker("distributed") or item.get_closest_marker("slurm")
    if item.config.pluginmanager.hasplugin("xdist"):
        item.add_marker(pytest.mark.xdist_group("processes" if alone else item.path.name))


@pytest.fixture
def forbid_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str], None]:
    """Makes a function of a module fail where it waits for the GPU, if that is where its first argument is."""

    def forbid(module: ModuleType, name: str) -> None:
        inner = getattr(module, name)

        def watched(*args: torch.Tensor) -> object:
            if not args[0].is_cuda:
                return inner(*args)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return inner(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(module, name, watched)

    return forbid


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group of this process alone, on the CPU with one thread."""
    from dist_spin.runtime import distributed

    distributed.start("cpu", threads=1)
    yield
    distributed.stop()


@pytest.fixture
def restored_process() -> Iterator[None]:
    """Stages take over signal handlers and torch's threads, which the tests after these want back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    kept, threads = {number: signal.getsignal(number) for number in numbers}, torch.get_num_threads()
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=BROWSER)
        yield chromium
        chromium.close()
