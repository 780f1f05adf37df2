"""Mixtures of experts: merging rotations changes nothing, experts are rounded from their own tokens, exports load elsewhere."""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, assert_a_layer_from_disk_computes, assert_codes_are_the_oracles
from safetensors.torch import load_file, save_file
from test_model import CPU, eager_and_compiled, learning_model, online_sites, reference_logits, relative
from test_transforms import build, learned_transforms, merged
from tiny import tiny_run, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

import dist_spin
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.model.activation_checkpoint import LEVELS
from dist_spin.model.architecture import Shape
from dist_spin.model.expert_storage import layer_in_checkpoints, name_here
from dist_spin.model.experts import CORRECTION, EXPERT_FAMILIES, Expert, ExpertList
from dist_spin.model.fake_quant_model import FakeQuantModel
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotate_quantize import ScaleAndClip
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.sites import DownProjInputQuant, QuantizedInputLinear
from dist_spin.model.sites_config import Sites
from dist_spin.model.stacked_experts import ExpertForm, StackedExperts
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.hadamard_transform import kronecker_factors
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.quantize.site_solver import SiteSolver
from dist_spin.runtime import distributed

WIDE = torch.float64
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
GPT_OSS, GLM, MINIMAX = "gpt-oss-20b (2880, 2880)", "glm-4.5 (5120, 1536)", "minimax-m2 (3072, 1536)"
AS_GLM = ("solar_open", "dots1", "minimax_m2")  # have its modules; tests/test_families.py holds what is theirs
MODELS = [name for name, c in FAMILIES.items() if c.model_type in EXPERT_FAMILIES and c.model_type not in AS_GLM]


@pytest.fixture(scope="module", params=MODELS)
def files(request, tmp_path_factory) -> ModelFiles:
    return open_model(str(write_model(FAMILIES[request.param], tmp_path_factory.mktemp("model"))))


@pytest.fixture
def alone() -> Iterator[distributed.World]:
    yield distributed.start("cpu", threads=1)
    distributed.stop()


def run_layers(files: ModelFiles, rotations, sites: Sites) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the router's logits of each layer."""
    weights = RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=rotations is not None)
    hidden, routers = weights.embedding()[IDS], []
    for i in range(files.shape.layers):
        layer = runner.build(i, weights.layer(i))
        if i < files.shape.dense:
            hidden = runner.run(layer, i, hidden)
            continue
        gate = layer.mlp.gate
        gate.register_forward_pre_hook(lambda module, inputs: routers.append(inputs[0] @ module.weight.T))
        hidden = runner.run(layer, i, hidden)
    return weights.head(files.config.rms_norm_eps).logits(hidden), routers


def test_function_and_routing_are_preserved_by_fold_and_rotate(files):
    plain, routers = run_layers(files, None, Sites())
    assert relative(plain, reference_logits(files, IDS, WIDE)) < 1e-9
    rotated, rotated_routers = run_layers(files, initial("orthogonal", files.shape, 3), online_sites(files, 16))
    assert relative(rotated, plain) < 1e-9
    for ours, original in zip(rotated_routers, routers, strict=True):
        assert relative(ours, original) < 1e-9
    quantised, first = run_layers(files, initial("hadamard", files.shape, 3), online_sites(files, 4))
    assert 1e-3 < relative(quantised, plain) < 1.5
    assert len(first) == files.shape.layers - files.shape.dense


@pytest.mark.parametrize(("sequences", "together"), [(4, 1), (80, 4)])
def test_experts_are_rounded_from_their_own_tokens_or_from_all_and_it_is_said(
    files, alone, tmp_path, sequences, together, monkeypatch
):
    said: list[str] = []
    monkeypatch.setattr("dist_spin.quantize.layer_quantizer.warn", said.append)
    sites = online_sites(files, 16)
    source = RotatedWeights(files.weights, files.shape, initial("hadamard", files.shape, 0), sites.r4, CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=True)
    quantizer = LayerQuantizer(runner, alone, "gptq", GPTQOptions(), WIDE)
    generator = torch.Generator().manual_seed(0)
    size = (together, 20, files.shape.hidden)
    hidden = [torch.randn(size, generator=generator, dtype=WIDE) for _ in range(sequences // together)]
    entered, weights = list(hidden), source.layer(1)
    made = quantizer.quantize(1, weights, hidden)
    assert set(made.quantized_weights) == set(files.shape.linears)
    assert torch.equal(made.others["mlp.gate.weight"], weights["mlp.gate.weight"])  # the router is not rounded
    assert all(0 < f["error"] < f["rtn_error"] < 1 for f in made.figures.values())
    assert any("experts were chosen by fewer than" in line for line in said) == (20 * sequences < 1000)
    assert_a_layer_from_disk_computes(tmp_path, runner, 1, made, entered, hidden)
    assert_codes_are_the_oracles(runner, 1, made, weights, entered)


def test_experts_solved_together_are_those_solved_one_by_one(files, alone, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("dist_spin.quantize.site_solver.warn", said.append)
    sites = online_sites(files, 16)
    source = RotatedWeights(files.weights, files.shape, initial("hadamard", files.shape, 0), sites.r4, CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=True)
    quantizer = LayerQuantizer(runner, alone, "gptq", GPTQOptions(group_size=4, mse_clip=True), WIDE, cd_passes=1)
    solve, groups = SiteSolver.solve, []
    monkeypatch.setattr(
        SiteSolver, "solve", lambda self, sites, *more: (groups.append(len(sites)), solve(self, sites, *more))
    )
    generator = torch.Generator().manual_seed(0)
    entered = [torch.randn(1, 20, files.shape.hidden, generator=generator, dtype=WIDE) for _ in range(10)]
    made, left = [], []
    for memory in (1, 2**20, 2**28):
        monkeypatch.setattr("dist_spin.quantize.site_solver.CPU_BYTES", memory)
        weights = source.layer(1)
        weights["mlp.experts.1.up_proj.weight"] = torch.zeros_like(weights["mlp.experts.1.up_proj.weight"])
        if (bias := "mlp.experts.1.up_proj.bias") in weights:  # gpt-oss's experts multiply by up_proj's output and 1
            weights[bias] = torch.full_like(weights[bias], -1)
        hidden = list(entered)
        made.append(quantizer.quantize(1, weights, hidden))
        left.append(torch.cat(hidden))
    assert max(groups) == files.shape.experts  # all of them at once in the end, and before that one by one, or some
    assert {1, files.shape.experts} <= set(groups)
    for other, states in zip(made[1:], left[1:], strict=True):
        assert torch.equal(states, left[0])
        assert set(other.quantized_weights) == set(files.shape.linears)
        for role, quantized in made[0].quantized_weights.items():
            for part, same in zip(quantized, other.quantized_weights[role], strict=True):
                assert torch.equal(part, same), role
            assert other.figures[role] == pytest.approx(made[0].figures[role], rel=1e-9), role
    # What one expert's down_proj reads is always 0: its codes are rounded to nearest, the others' are not.
    assert sum("the input of down_proj is always zero" in line for line in said) == len(said) == 3
    assert made[2].figures["mlp.experts.1.down_proj"]["damping"] == 0
    assert made[2].figures["mlp.experts.0.down_proj"]["damping"] == 0.01


def test_a_run_quantises_measures_and_exports_what_transformers_loads(files, tmp_path):
    settings = tiny_run(
        tmp_path,
        "optimize.steps=0",
        "rotation.online=false",
        "quant.w_bits=4",
        "quant.a_bits=16",
        "quant.k_bits=16",
        "quant.v_bits=16",
        "export.target=hf",
        "export.profile=no-had",
        model=files.directory,
    )
    for verb in ("quantize", "evaluate", "export"):
        assert main([verb, *settings]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert rows
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "## Calibration tokens of the experts" in page
    assert f"| 1 | {files.shape.experts} |" in " ".join(page.split())
    assert "those of a mixture of experts are not measured" in page
    assert "measured yet" not in page
    (export,) = {path.parent for path in tmp_path.rglob("dist_spin*.json")} - {tmp_path}
    written = json.loads((export / "config.json").read_text())
    if files.config.model_type == "glm4_moe":  # for transformers before version 5, and for speculative decoding
        assert (written["partial_rotary_factor"], written["num_nextn_predict_layers"]) == (0.5, 0)
    exported = reference_logits(open_model(str(export)), IDS, WIDE)
    assert relative(exported, reference_logits(files, IDS, WIDE)) < 1e-9
    with torch.no_grad():
        assert relative(dist_spin.load(export, "cpu")(IDS).logits, exported) < 1e-9


def test_rotations_are_fitted_and_another_config_is_another_model(files, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(files.directory, model)
    settings = tiny_run(tmp_path, "optimize.steps=0", "rotation.init=range", model=model)
    assert main(["optimize", *settings]) == 0
    assert main(["quantize", *settings]) == 0
    layer = min((tmp_path / "run" / "layers").rglob("*.safetensors"))
    before = layer.stat().st_mtime_ns
    assert main(["quantize", *settings]) == 0
    assert layer.stat().st_mtime_ns == before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    assert main(["quantize", *settings]) == 0
    assert layer.stat().st_mtime_ns != before


def test_experts_stored_in_one_tensor_are_the_same_model(files, tmp_path):
    if files.config.model_type == "gpt_oss":  # which has a test of its own below
        return
    tensors = load_file(files.directory / "model.safetensors")
    count, layers = files.shape.experts, files.shape.layers
    names = ("w1", "w3", "w2") if files.config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    inner = "block_sparse_moe" if files.config.model_type == "mixtral" else "mlp"
    for i in range(files.shape.dense, layers):
        prefix = f"model.layers.{i}.{inner}.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{name}.weight") for e in range(count)]) for name in names
        )
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = down
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(files.directory / "config.json", tmp_path)
    stacked = open_model(str(tmp_path))
    assert not stacked.notes
    for name in (f"model.layers.1.{role}.weight" for role in files.shape.linears):
        assert torch.equal(stacked.weights.rows(name), files.weights.rows(name)), name
        assert torch.equal(stacked.weights.rows(name, 3, 7), files.weights.rows(name, 3, 7)), name
    # transformers reads them as the same model, too
    assert relative(reference_logits(stacked, IDS, WIDE), reference_logits(files, IDS, WIDE)) < 1e-12
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(
            config | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count + 1) | {"n_group": 1}
        )
    )
    h = files.shape.hidden
    with pytest.raises(UserError, match=f"is {count} x {h}, its config.json says {count + 1} x {h}"):
        open_model(str(tmp_path))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> ModelFiles:
    return open_model(str(write_model(FAMILIES[GPT_OSS], tmp_path_factory.mktemp("gpt_oss"))))


def test_experts_of_gpt_oss_are_read_out_of_its_stacks_and_written_as_them(gpt_oss):
    stored = load_file(gpt_oss.directory / "model.safetensors")
    prefix = "model.layers.1."
    of_layer = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for e in range(gpt_oss.shape.experts):
        gate_up, down = (of_layer[f"mlp.experts.{stack}"][e].T for stack in ("gate_up_proj", "down_proj"))
        bias = of_layer["mlp.experts.gate_up_proj_bias"][e]
        for name, wanted in (
            ("gate_proj.weight", gate_up[0::2]),
            ("up_proj.weight", gate_up[1::2]),
            ("down_proj.weight", down),
            ("gate_proj.bias", bias[0::2]),
            ("up_proj.bias", bias[1::2]),
            ("down_proj.bias", of_layer["mlp.experts.down_proj_bias"][e]),
        ):
            whole = f"{prefix}mlp.experts.{e}.{name}"
            assert gpt_oss.weights.row_count(whole) == len(wanted)
            assert torch.equal(gpt_oss.weights.rows(whole), wanted), whole
            assert torch.equal(gpt_oss.weights.rows(whole, 3, 7), wanted[3:7]), whole
    plain = RotatedWeights(gpt_oss.weights, gpt_oss.shape, None, (), CPU, WIDE).layer(1)
    written = layer_in_checkpoints("gpt_oss", plain)
    assert written.keys() == of_layer.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, of_layer[name]), name


def dequantised(tmp_path, model, tensors, how, dequantiser):
    """A checkpoint of codes, refused as its 16-bit `model` is not, as transformers dequantises it: our files and its model."""
    packed, written = tmp_path / "packed", tmp_path / "dequantised"
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    content = json.loads((model / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(content | {"quantization_config": how}))
    name = f"{how['quant_method']}, .*{dequantiser.__name__}"
    with pytest.raises(UserError, match=rf"already quantised \({name}\(dequantize=True\)"):
        open_model(str(packed))
    theirs = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=dequantiser(dequantize=True), dtype=torch.bfloat16
    )
    theirs.save_pretrained(written, save_original_format=False)
    files = open_model(str(written))
    assert not files.notes
    return files, theirs


def test_a_published_gpt_oss_is_dequantised_as_its_refusal_says(tmp_path):
    """Checkpoints of gpt-oss hold its experts in MXFP4, [experts, outputs, inputs / 32, 16] bytes and a scale for each 16."""
    config = copy.deepcopy(FAMILIES[GPT_OSS])
    config.hidden_size, config.intermediate_size = 64, 32
    model = write_model(config, tmp_path / "model", dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    g = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            256, (count, outputs, inputs // 32, 16), generator=g, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(122, 126, (count, outputs, inputs // 32), generator=g).byte()
    files, theirs = dequantised(tmp_path, model, tensors, {"quant_method": "mxfp4"}, Mxfp4Config)
    expert = theirs.model.layers[1].mlp.experts
    assert torch.equal(
        files.weights.rows("model.layers.1.mlp.experts.3.up_proj.weight"), expert.gate_up_proj[3].T[1::2]
    )
    assert torch.equal(files.weights.rows("model.layers.1.mlp.experts.3.down_proj.weight"), expert.down_proj[3].T)


def test_a_published_minimax_is_dequantised_as_its_refusal_says(tmp_path):
    """Checkpoints of MiniMax-M2 hold FP8 codes, and `weight_scale_inv` of blocks of 128 x 128, in which these weights fit."""
    model = write_model(FAMILIES[MINIMAX], tmp_path / "model", dtype=torch.bfloat16)
    tensors, wanted = load_file(model / "model.safetensors"), {}
    kept = ("gate.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight")
    for name in [name for name in tensors if name.endswith("weight") and not name.endswith(kept)]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(1, 1)
        wanted[name] = (tensors[name].float() * scale).bfloat16()
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]}
    files, _ = dequantised(tmp_path, model, tensors, how, FineGrainedFP8Config)
    assert len(wanted) == 2 * (4 + 3 * files.shape.experts)
    for name, weight in wanted.items():
        assert relative(files.weights.rows(name_here(name)), weight) < 2**-8, name


def test_what_corrects_a_router_is_not_rounded_to_16_bits(tmp_path):
    files = open_model(str(write_model(FAMILIES[GLM], tmp_path, dtype=torch.bfloat16)))
    stored, rotations = files.weights.rows(f"model.layers.1.{CORRECTION}"), initial("hadamard", files.shape, 0)
    assert stored.dtype == torch.float32
    for merged_with in (None, rotations):
        weights = RotatedWeights(files.weights, files.shape, merged_with, (), CPU, torch.bfloat16).layer(1)
        runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.bfloat16, rotated=merged_with is not None)
        assert torch.equal(runner.build(1, weights).get_parameter(CORRECTION), stored)
    model = learning_model(files, Rotations(*rotations, CPU, torch.bfloat16), Sites(), torch.bfloat16)
    assert torch.equal(model.layers[1].layer.get_parameter(CORRECTION), stored)


def test_an_r4_that_dense_layers_cannot_have_is_refused_with_a_block_that_they_can():
    sizes = {"hidden": 4096, "intermediate": 1408, "heads": 96, "kv_heads": 8, "head_dim": 128, "layers": 46}
    air = Shape(**sizes, vocab=151552, experts=128, experts_per_token=8, shared=1408, dense=1, dense_width=10944)
    with pytest.raises(UserError, match=r"R4 of 1408 channels.* the 10944 of .*set rotation\.r4_block=64, or"):
        sites_for(load_config(None, ["model.path=any"]), air)
    sites = sites_for(load_config(None, ["model.path=any", "rotation.r4_block=64"]), air)
    assert math.prod(map(len, sites.r4)) == 64


@pytest.mark.parametrize("form", [ExpertForm("silu"), ExpertForm("", biases=True, limit=1.0, alpha=1.702)])
def test_stacked_experts_compute_and_differentiate_what_a_list_of_them_does(form):
    experts, hidden, width, chosen = 5, 16, 24, 2
    g = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=WIDE)

    r4, spec = kronecker_factors(width, 0, dtype=WIDE, device="cpu"), QuantSpec(4)
    listed = ExpertList([Expert(hidden, width, form) for _ in range(experts)]).to(WIDE).requires_grad_(False)
    stacked = StackedExperts(experts, hidden, width, form).to(WIDE).requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows = torch.cat([getattr(expert, name).weight for expert in listed])
        getattr(stacked, name).weight.copy_(rows)
        if form.biases:
            getattr(stacked, name).bias.copy_(torch.cat([getattr(expert, name).bias for expert in listed]))
    routes = torch.rand(40, experts - 1, generator=g).topk(chosen).indices  # the last expert is chosen by no token
    found, weights = [], drawn(40, hidden)
    inputs = (drawn(40, hidden), drawn(40, chosen), 0.3 * drawn(experts, width), drawn(()))
    for experts_of_layer in (listed, stacked):
        x, shares, scale, clip = (t.clone().requires_grad_() for t in inputs)
        if experts_of_layer is stacked:
            stacked.down_site = DownProjInputQuant(spec, r4, ScaleAndClip(scale, clip), unfold=True)
        else:
            for e, expert in enumerate(listed):
                site = DownProjInputQuant(spec, r4, ScaleAndClip(scale[e], clip), unfold=True)
                expert.down_proj = QuantizedInputLinear(site, expert.down_proj)
        out = experts_of_layer(x, shares, routes)
        (out * weights).sum().backward()
        found.append((out.detach(), x.grad, shares.grad, scale.grad, clip.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_what_is_recomputed_changes_no_gradient(files):
    gradients = []
    for level in LEVELS:
        rotations = Rotations(*initial("hadamard", files.shape, 0), CPU, WIDE, learn=True)
        model = learning_model(files, rotations, online_sites(files, 4), WIDE)
        model.set_levels([level] * files.shape.layers)
        model(IDS).sum().backward()
        gradients.append(rotations.gradient)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.slow
def test_one_compiled_graph_serves_all_layers(tmp_path):
    def make(files: ModelFiles, rotations: Rotations, **more) -> FakeQuantModel:
        return learning_model(files, rotations, online_sites(files, 4), WIDE, **more)

    n = FAMILIES[MODELS[0]].hidden_size
    gradients = eager_and_compiled(tmp_path, IDS, make, kind=FAMILIES[MODELS[0]])
    eager, compiled = (tangent(gradient[: n * n].view(n, n)) for gradient in gradients)
    assert relative(compiled, eager) < 1e-9


@pytest.mark.parametrize("bits", [4, 16])
def test_scales_of_every_expert_merge_into_what_was_learned(files, bits):
    rotations = initial("hadamard", files.shape, seed=5)
    sites, transforms = online_sites(files, bits), learned_transforms(files)
    model = build(files, Rotations(*rotations, CPU, WIDE, learn=True), sites, transforms)
    with torch.no_grad():
        attached = model(IDS)
    logits = merged(files, rotations, sites, transforms.values(), IDS)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(attached, loss.view(2, -1).mean(-1), rtol=1e-9, atol=0)
    if bits == 16:  # merging scales changes neither the function nor the routing
        assert relative(logits, reference_logits(files, IDS, WIDE)) < 1e-9


def test_rotations_scales_and_clips_are_learned_quantised_and_measured(files, tmp_path):
    more = ("optimize.steps=4", "optimize.scales=true", "optimize.clips=true", "optimize.objective=mixed")
    settings = tiny_run(tmp_path, *more, "optimize.guard_every=2", "optimize.guard_sequences=4", model=files.directory)
    for verb in ("optimize", "quantize", "evaluate"):
        assert main([verb, *settings]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["grad_norm"] > 0 for line in lines)
    assert json.loads((tmp_path / "run" / "results.json").read_text())


def test_what_is_not_built_for_experts_is_refused_in_one_line(files, tmp_path, capsys):
    assert main(["optimize", *tiny_run(tmp_path, "optimize.w_bits=4", model=files.directory)]) == 2
    said = capsys.readouterr()
    assert "optimize.w_bits=4, but with experts rotations are learned from 16-bit weights; set" in said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert main(["plan", f"model.path={files.directory}", "optimize.w_bits=16", "quantize.tune_steps=2"]) == 2
    assert "quantize.tune_steps is for models without experts; set it to 0" in capsys.readouterr().err


def test_dense_layers_among_the_experts_are_refused(files, tmp_path):
    config = json.loads((files.directory / "config.json").read_text())
    if config["model_type"] in ("mixtral", "olmoe", "gpt_oss", "glm4_moe"):
        return
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0]}))
    with pytest.raises(UserError, match="mlp_only_layers"):
        open_model(str(tmp_path), dummy=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_group", None),
        ("topk_group", None),
        ("first_k_dense_replace", None),
        ("num_experts_per_tok", None),
        ("num_experts_per_tok", 9),
    ],
)
def test_routers_that_cannot_choose_are_refused_by_the_name_of_the_setting(name, value, tmp_path):
    config = FAMILIES["dots-llm1 (4608, 1408)"].to_dict() | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name}={value} of config.json"):
        open_model(str(tmp_path), dummy=True)


def test_packed_experts_have_the_names_and_bits_that_engines_read(files, tmp_path, capsys):
    more = (
        "optimize.steps=0",
        "rotation.online=false",
        "export.profile=no-had",
        "quant.w_bits=4",
        "model.dtype=float32",
    )
    off = ("quant.a_bits=16", "quant.k_bits=16", "quant.v_bits=16", "export.target=compressed-tensors")
    settings = tiny_run(tmp_path, *more, *off, model=files.directory)
    if files.config.model_type == "gpt_oss":
        assert main(["quantize", *settings]) == 2
        assert "packed experts of gpt-oss are read by no loader" in capsys.readouterr().err
        return
    for verb in ("quantize", "export"):
        assert main([verb, *settings]) == 0
    (export,) = {path.parent for path in tmp_path.rglob("dist_spin.json")}
    names = {name for file in export.glob("model-*.safetensors") for name in load_file(file)}
    mixtral = files.config.model_type == "mixtral"
    router, down = ("block_sparse_moe.gate", "w2") if mixtral else ("mlp.gate", "down_proj")
    inner = router.removesuffix(".gate")
    # As vLLM's loaders of these families name them, beside a router of 16 bits, which its config must leave alone.
    assert f"model.layers.1.{router}.weight" in names
    for kind in ("packed", "scale", "shape"):
        assert f"model.layers.1.{inner}.experts.3.{down}.weight_{kind}" in names
    ignored = json.loads((export / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(re.fullmatch(pattern.removeprefix("re:"), f"model.layers.1.{router}") for pattern in ignored)
    with torch.no_grad():
        ours = dist_spin.load(export, "cpu")
        logits = ours(IDS).logits
        dequantised = CompressedTensorsConfig(dequantize=True)
        theirs = AutoModelForCausalLM.from_pretrained(export, quantization_config=dequantised, dtype=torch.float32)
        assert relative(theirs(IDS).logits, logits) < 1e-5
        assert relative(logits, reference_logits(files, IDS, torch.float32)) > 1e-2
    # Greedy continuation, with a cache and without.
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (ours.generate(IDS[:, :8], use_cache=cached, **call) for cached in (True, False))
    assert torch.equal(with_cache, without)
