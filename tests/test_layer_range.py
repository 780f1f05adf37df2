"""When a range of layers stops."""

import pytest
import torch
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted
from dist_spin.quantize import calibration_states
from dist_spin.quantize.layer_range import quantize_layers
from dist_spin.quantize.stage import open_ranges, prepare_jobs
from dist_spin.runtime.distributed import start, stop
from dist_spin.storage.tensor_file import load_tensors


def test_a_signal_during_the_models_last_layer_is_heeded_before_the_next_range(tmp_path, restored_process):
    words = tiny_run(tmp_path, "name=run", "optimize.steps=0", "quantize.baselines=[none]")
    world = start("cpu", 60, 1)
    try:
        jobs = prepare_jobs(load_config(None, words), world)
        first, second = (layer_range for job in jobs for layer_range in open_ranges(job))
        for index, _ in enumerate(quantize_layers(first)):
            first.job.stop.name = "SIGTERM" if index + 1 == first.stop else ""
        with pytest.raises(Interrupted, match="stopped by a signal before layer 0"):
            list(quantize_layers(second))
        assert not any(open_ranges(first.job))
        assert second.job.finished(second.start, second.stop) == [False] * (second.stop - second.start)
    finally:
        stop()


def test_sequences_that_go_through_a_layer_together_give_the_codes_of_those_that_go_alone(
    tmp_path, monkeypatch, restored_process
):
    words = tiny_run(tmp_path, "optimize.steps=0", "quantize.layers_per_job=1")
    for name, at_once in (("alone", 1), ("together", 5)):
        monkeypatch.setattr(calibration_states, "sequences_at_once", lambda length, device, n=at_once: n)
        assert main(["quantize", *words, f"name={name}"]) == 0
    for layer in ("000", "001"):
        alone, together = (
            load_tensors(tmp_path / name / "layers" / f"{layer}.safetensors")[0] for name in ("alone", "together")
        )
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            if name.endswith(".packed"):
                assert torch.equal(together[name], tensor)
            else:
                torch.testing.assert_close(together[name], tensor, rtol=1e-9, atol=0)
