"""What several of these tests learn on."""

import pytest
from tiny import tiny_run


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Settings of a run on a model with tied weights, biases and grouped keys.

    2 and 3 ranks divide neither its sizes (a vocabulary of 97) nor, up to 4 ranks, its 5 sequences per step.
    """
    directory = tmp_path_factory.mktemp("model")
    return tiny_run(directory, "optimize.batch_size=5", "optimize.steps=5", kind="qwen2", model=directory)
