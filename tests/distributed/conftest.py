"""What several of these tests learn on."""

import numpy as np
import pytest
from tiny import write_model


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Settings of a run on a model with tied weights, biases and grouped keys.

    2 and 3 ranks divide neither its sizes (a vocabulary of 97) nor, up to 4 ranks, its 5 sequences per step.
    """
    place = write_model("qwen2", tmp_path_factory.mktemp("model"))
    np.save(place / "tokens.npy", np.random.default_rng(0).integers(3, 97, (30, 20)))
    return [
        f"model.path={place}",
        "model.dtype=float64",
        f"optimize.source=tokens:{place / 'tokens.npy'}",
        "optimize.seq_len=20",
        "optimize.batch_size=5",
        "optimize.steps=5",
        "distributed.device=cpu",
        "distributed.threads=1",
    ]
