"""A checkpoint of random weights of a real shape on disk, and text for it, written once and used again."""

import json
from pathlib import Path

import numpy as np
import torch

from dist_spin.bench.optimize import json_config
from dist_spin.export.directory import Shards
from dist_spin.model.architecture import skeleton
from dist_spin.model.weights import DummyWeights
from dist_spin.runtime.prefetch import prefetched
from dist_spin.storage.atomic import write_json

SHARD_BYTES = 4e9
WRITTEN = "random.json"  # last, when everything is there
TOKENS, TOKENS_FILE = (1024, 2048), "tokens.npy"  # sequences of random ids


def random_checkpoint(shape: Path, directory: Path, layers: int) -> Path:
    """The directory below `directory` of a bf16 checkpoint of the shape in `shape`/config.json with `layers` (0: all) layers.

    Weights keep the size of what they multiply, as those of a model do. Written where it is not there yet.
    """
    content = json.loads((shape / "config.json").read_text())
    content["num_hidden_layers"] = layers or content["num_hidden_layers"]
    target = directory / f"{shape.resolve().name}-{content['num_hidden_layers']}"
    if (target / WRITTEN).exists() and json.loads((target / WRITTEN).read_text()) == content:
        return target
    target.mkdir(parents=True, exist_ok=True)
    (target / WRITTEN).unlink(missing_ok=True)
    write_json(target / "config.json", content)
    config = json_config(target)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = DummyWeights(config, torch.bfloat16)
    names = [name for name, _ in skeleton(config).named_parameters()]
    with Shards(target, SHARD_BYTES) as shards:
        for name, tensor in zip(
            names, prefetched(lambda n: weights.rows(n, device=device), names, device), strict=True
        ):
            shards.add(name, tensor)
        shards.finish()
    ids = np.random.default_rng(0).integers(0, content["vocab_size"], TOKENS)
    np.save(target / TOKENS_FILE, ids)
    write_json(target / WRITTEN, content)
    return target
