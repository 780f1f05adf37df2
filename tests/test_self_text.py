"""Text that the model writes itself."""

import pytest
import torch
from tiny import tiny_run
from transformers import AutoModelForCausalLM

from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.optimize.setup import learning_tokens
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.self_generated_text import BATCH, GREEDY, self_text
from dist_spin.pipeline.variants import calibration_tokens
from dist_spin.storage.run_directory import run_dir

pytestmark = pytest.mark.usefixtures("group_of_one", "restored_process")


def prepared(place, *more):
    sizes = ["quantize.n_sequences=20", "quantize.seq_len=12"]
    words = tiny_run(place / "runs", "quantize.source=self", *sizes, *more, model=place / "model")
    config = load_config(None, words)
    return config, open_configured_model(config)


def test_it_starts_likely_and_goes_on_as_the_model_would(tmp_path):
    config, files = prepared(tmp_path, "quantize.n_sequences=96", "quantize.seq_len=24")
    tokens = calibration_tokens(config, files)
    assert tokens.shape == (96, 24)
    assert tokens.dtype == torch.int64
    assert len(tokens[:, 0].unique()) > 40
    model = AutoModelForCausalLM.from_pretrained(files.directory, dtype=torch.float64)
    with torch.no_grad():
        log_p = model(tokens).logits[:, :-1].log_softmax(-1)  # without a cache, all at once
    likely = log_p.argmax(-1) == tokens[:, 1:]
    assert likely[:, : GREEDY[0]].all()
    later = slice(GREEDY[1] - 1, None)
    assert 0 < likely[:, later].double().mean() < 0.9
    # Of text drawn from the model, the mean log-probability is minus its mean entropy.
    chosen = log_p.gather(-1, tokens[:, 1:, None])[:, later, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)[:, later]
    spread = float((chosen + entropy).std()) / chosen.numel() ** 0.5
    assert abs(float((chosen + entropy).mean())) < 4 * spread


def test_it_is_kept_and_continued(tmp_path):
    config, files = prepared(tmp_path)
    tokens = calibration_tokens(config, files)
    kept = sorted((run_dir(config).path / "self_text").rglob("*.safetensors"))
    assert len(kept) == -(-20 // BATCH)
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    kept[1].write_bytes(before[1][0][:-5])
    assert torch.equal(calibration_tokens(config, files), tokens)
    assert (kept[0].read_bytes(), kept[0].stat().st_mtime_ns) == before[0]
    assert kept[1].read_bytes() == before[1][0]
    assert kept[1].with_suffix(".stale").read_bytes() == before[1][0][:-5]
    assert torch.equal(self_text(config, files, 5, 12, config.quantize.seed), tokens[:5])
    assert not torch.equal(self_text(config, files, 5, 12, 7), tokens[:5])


def test_learning_may_use_it_and_measuring_may_not(tmp_path):
    config, files = prepared(
        tmp_path, "optimize.source=self", "optimize.steps=3", "optimize.batch_size=2", "optimize.seq_len=8"
    )
    assert learning_tokens(config, files).shape == (6, 8)
    with pytest.raises(UserError, match=r"evaluate\.sources"):
        load_config(None, ["model.path=x", "evaluate.sources=[self]"])


def test_random_weights_write_nothing(tmp_path):
    config, files = prepared(tmp_path, "model.dummy_weights=true")
    with pytest.raises(UserError, match="random weights"):
        calibration_tokens(config, files)
