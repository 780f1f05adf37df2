"""Layers of other methods are learned by whichever rank takes them, and come out the same."""

from pathlib import Path

import pytest
from ranks import Job
from safetensors.torch import load_file
from tiny import tiny_run

pytestmark = pytest.mark.distributed


def learn_both(words: list[str]) -> None:
    """What each rank does."""
    from dist_spin.compare.method_variants import learn
    from dist_spin.config.loader import load_config
    from dist_spin.pipeline.model import open_configured_model
    from dist_spin.runtime import distributed

    config = load_config(None, words)
    world = distributed.start("cpu", threads=1)
    files = open_configured_model(config)
    for name in ("flatquant", "dartquant"):
        learn(config, world, files, name)
    distributed.stop()


def test_two_ranks_learn_what_one_does(tmp_path):
    more = ["quantize.n_sequences=8", "quantize.seq_len=16", "methods.flat_epochs=2"]
    contents: list[dict[str, bytes]] = []
    for size in (1, 2):
        output_dir = tmp_path / f"runs{size}"
        words = tiny_run(output_dir, *more, model=tmp_path / "model", layers=3, split="#all")
        job = Job(size, learn_both, words, log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        paths = sorted(output_dir.rglob("*.safetensors"))
        contents.append({str(path.relative_to(output_dir)): path.read_bytes() for path in paths})
    assert [Path(name).name for name in contents[0]].count("rotations.safetensors") == 1
    assert len(contents[0]) == 4  # DartQuant's layers are gone once its rotations are there
    assert contents[0] == contents[1]


def train_whole(words: list[str]) -> None:
    """What each rank does."""
    from dist_spin.compare.method_variants import learn
    from dist_spin.config.loader import load_config
    from dist_spin.pipeline.model import open_configured_model
    from dist_spin.runtime import distributed

    config = load_config(None, words)
    world = distributed.start("cpu", threads=1)
    learn(config, world, open_configured_model(config), "llm_qat")
    distributed.stop()


def test_a_whole_model_is_trained_on_any_number_of_ranks(tmp_path):
    more = ["quantize.n_sequences=6", "quantize.seq_len=12"]
    more += ["methods.qat_steps=3", "methods.qat_batch_size=3", "methods.qat_lr=1e-3"]
    tensors = []
    for size in (1, 2, 4):  # four: one of them has no sequence
        output_dir = tmp_path / f"runs{size}"
        words = tiny_run(output_dir, *more, model=tmp_path / "model")
        job = Job(size, train_whole, words, log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        files = sorted((output_dir / "run" / "methods").rglob("*.safetensors"))
        tensors.append({f"{path.name} {name}": t for path in files for name, t in load_file(path).items()})
    assert len(tensors[0]) == 2 * 9 + 2
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        for name, tensor in other.items():
            assert (tensor - tensors[0][name]).abs().max() < 1e-8, name
