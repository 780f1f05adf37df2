"""Scales are tuned the same on two ranks as on one."""

import pytest
import torch
from ranks import Job, command
from tiny import tiny_run

from dist_spin.storage.quantized_layers import load_layer

pytestmark = pytest.mark.distributed


def test_two_ranks_tune_what_one_tunes(tmp_path):
    words = tiny_run(tmp_path, "optimize.steps=0", "quantize.tune_steps=3", "quantize.tune_lr=0.01", sequences=40)
    layers = []
    for size in (1, 2):
        job = Job(size, command, "quantize", *words, f"name=of{size}", log=tmp_path / "log")
        assert job.wait() == [0] * size, job.log.read_text()
        assert "divergence of held-out sequences" in job.log.read_text()
        layers.append(load_layer(tmp_path / f"of{size}" / "layers" / "001.safetensors")[0])
    for role, weight in layers[0].quantized_weights.items():
        assert torch.equal(layers[1].quantized_weights[role].codes, weight.codes)
        torch.testing.assert_close(layers[1].quantized_weights[role].scale, weight.scale, rtol=1e-9, atol=0)
