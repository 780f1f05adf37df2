"""When a range of layers stops."""

import pytest
from tiny import tiny_run

from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted
from dist_spin.quantize.layer_range import quantize_layers
from dist_spin.quantize.stage import open_ranges, prepare_jobs
from dist_spin.runtime.distributed import start, stop


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
