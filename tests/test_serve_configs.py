"""The recipes of configs/serve: each fits its target, names its command, and runs to an export."""

from pathlib import Path

import pytest
import torch
from exported import logits, pipeline_cell
from tiny import tiny_run
from transformers import LlamaConfig

import dist_spin
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.export.compressed import config_entries
from dist_spin.export.serving import serve_command
from dist_spin.model.architecture import LAYER_LINEARS, Shape
from dist_spin.pipeline.export_limits import check_target
from dist_spin.pipeline.quant_sites import sites_for

RECIPES = sorted(Path("configs/serve").glob("*.yaml"))
LLAMA = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_target_and_names_the_command_that_serves_it(path):
    config = load_config(str(path), [])
    check_target(config.export.target, config, LLAMA, starting=True)
    sites, quant = sites_for(config, Shape.of(LLAMA)), config.quant
    assert sites.r3 == sites.r4 == ()
    bits = dict.fromkeys(LAYER_LINEARS, quant.w_bits)
    grid = {"symmetric": quant.w_symmetric, "group_size": quant.weights_per_scale, "weight_format": quant.w_format}
    entries = config_entries(sites, bits, **grid)
    command = serve_command(f"runs/{config.name}/export/compressed-tensors", entries, sites)
    assert f"#   {command}\n" in path.read_text()


@pytest.mark.usefixtures("restored_process")
def test_a_recipe_runs_from_learning_to_an_export_that_loads(tmp_path):
    sizes = ["quant.w_group_size=16", "quant.a_group_size=16", "optimize.guard_sequences=2", "optimize.warmup_steps=0"]
    words = [*tiny_run(tmp_path, *sizes, "model.dtype=float32", "name=served"), "optimize.guard_every=1"]
    recipe = str(Path("configs/serve/w4a4-groups.yaml").resolve())
    for stage in ("optimize", "quantize", "export"):
        assert main([stage, recipe, *words]) == 0
    card = (tmp_path / "served" / "export" / "compressed-tensors" / "README.md").read_text()
    assert "| Learned for | activations 4 bits, keys 16, values 16 |" in card
    assert "    vllm serve PATH OF THIS DIRECTORY --linear-backend humming\n" in card
    model = dist_spin.load(tmp_path / "served" / "export" / "compressed-tensors", device="cpu")
    given = tmp_path / "served" / "config.yaml"
    made = pipeline_cell([], "gptq", config=load_config(str(given), [f"output_dir={tmp_path}"]))
    assert torch.equal(logits(model), logits(made))
