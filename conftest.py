"""How the tests are spread over pytest-xdist's workers, and which are skipped on this machine."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU; choose the worker of each test (`--dist loadgroup`).

    Tests that start processes of their own (`distributed`, `slurm`) share one group, so that two of them never compete
    for the machine. Every other file is a group, so that its module fixtures are built once.
    """
    spread = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if spread and not item.get_closest_marker("xdist_group"):
            alone = item.get_closest_marker("distributed") or item.get_closest_marker("slurm")
            item.add_marker(pytest.mark.xdist_group("processes" if alone else item.path.name))
