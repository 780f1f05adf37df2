"""Every family and size: rotations change nothing but what is quantised, gradients are right, layers quantise and reload."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from exported import NO_HAD, W4A16, exported, logits, make_run
from families import FAMILIES, ONE_OF_EACH, WITHOUT_R1, assert_a_layer_from_disk_computes, assert_codes_are_the_oracles
from test_model import WeightSide, learning_model, merged_logits, online_sites, reference_logits, relative
from test_states_network import network, rotated_network, states
from tiny import tiny_run, write_model
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import dist_spin
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape
from dist_spin.model.experts import EXPERT_FAMILIES
from dist_spin.model.families import REFUSED
from dist_spin.model.full_model import build_full_model
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Rotations, initial
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.numerics.hadamard import hadamard_core
from dist_spin.pipeline.export_limits import conflicts
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.runtime import distributed

CPU = torch.device("cpu")
WIDE = torch.float64
CACHE16 = ["quant.k_bits=16", "quant.v_bits=16"]
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def files(request, tmp_path_factory) -> ModelFiles:
    config = FAMILIES[request.param]
    place = write_model(config, tmp_path_factory.mktemp("model"), layers=config.num_hidden_layers)
    return open_model(str(place))


@pytest.fixture
def alone() -> Iterator[distributed.World]:
    yield distributed.start("cpu", threads=1)
    distributed.stop()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_small_sizes_stand_for_the_real_ones(name):
    shape = Shape.of(FAMILIES[name])
    hidden, intermediate = map(int, name.split("(")[1].rstrip(")").split(", "))
    assert hidden * shape.intermediate == intermediate * shape.hidden  # one ratio
    for real, small in ((hidden, shape.hidden), (intermediate, shape.intermediate)):
        core, odd = hadamard_core(real)[0], small // (small & -small)
        assert core % odd == 0
        assert core == hadamard_core(small)[0] or core > 512  # a product of cores needs more factors of two


def test_function_is_preserved_by_fold_and_rotate(files):
    logits = merged_logits(files, initial("orthogonal", files.shape, 3), online_sites(files, 16), IDS, WIDE)
    assert relative(logits, reference_logits(files, IDS, WIDE)) < 1e-9


def test_states_of_the_original_network_times_r1_are_those_of_the_rotated_one(files):
    rotations, layers = initial("orthogonal", files.shape, 3), files.shape.layers
    found = states(network(files, WIDE, rotations[0]), layers)
    wanted = states(rotated_network(files, WIDE, rotations), layers)
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) < 1e-9
    assert relative(found[-1], states(network(files, WIDE), layers)[-1]) > 0.1


def test_attached_rotations_are_the_merged_ones_and_so_are_their_gradients(files):
    r1, r2 = initial("hadamard", files.shape, seed=5)
    sites = online_sites(files, 4)
    rotations = Rotations(r1, r2, CPU, WIDE, learn=True)
    losses = learning_model(files, rotations, sites, WIDE)(IDS)
    losses.mean().backward()
    logits = merged_logits(files, (r1, r2), sites, IDS, WIDE)
    merged = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses, merged.view(2, -1).mean(-1), rtol=1e-9, atol=0)
    oracle = WeightSide(files, sites, r1, r2)
    oracle(IDS).backward()
    assert relative(tangent(rotations.lie_grad1), tangent(oracle.r1.grad @ r1.T)) < 1e-9
    assert relative(tangent(rotations.lie_grad2), tangent(oracle.r2.grad @ r2.mT)) < 1e-9
    assert float(tangent(rotations.lie_grad1).norm()) > 1e-3


def test_layers_are_quantised_and_reload_as_they_were(files, alone, tmp_path, request):
    sites = online_sites(files, 16)
    rotations = initial("hadamard", files.shape, 0)
    source = RotatedWeights(files.weights, files.shape, rotations, sites.r4, CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=True)
    quantizer = LayerQuantizer(runner, alone, "gptq", GPTQOptions(), WIDE)
    generator = torch.Generator().manual_seed(0)
    last = files.shape.layers - 1
    hidden = [torch.randn(1, 20, files.shape.hidden, generator=generator, dtype=WIDE) for _ in range(6)]
    entered, weights = list(hidden), source.layer(last)
    made = quantizer.quantize(last, weights, hidden)
    assert set(made.quantized_weights) == set(files.shape.linears)
    assert all(0 < f["error"] < f["rtn_error"] < 1 for f in made.figures.values())
    assert_a_layer_from_disk_computes(tmp_path, runner, last, made, entered, hidden)
    if request.node.callspec.params["files"] in ONE_OF_EACH.values():
        assert_codes_are_the_oracles(runner, last, made, weights, entered)


def test_generation_reads_its_cache_as_it_would_read_the_text_again(files):
    sites = online_sites(files, 4)
    weights = RotatedWeights(files.weights, files.shape, initial("hadamard", files.shape, 0), sites.r4, CPU, WIDE)
    model = build_full_model(
        files.config,
        sites,
        layer=weights.layer,
        embedding=weights.embedding(),
        head=weights.head_weight(),
        rotated=True,
        device=CPU,
        dtype=WIDE,
    )
    cached, again = (model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert cached.shape == (2, 26)
    assert torch.equal(cached, again)


@pytest.mark.parametrize(
    "kind",
    # The others are exported by tests of their own: test_export.py, test_experts.py.
    [
        kind
        for kind in ONE_OF_EACH
        if kind not in ("llama", "mistral", "qwen2", "qwen3", *EXPERT_FAMILIES)
        or kind in ("solar_open", "dots1", "minimax_m2")
    ],
)
def test_exports_load_elsewhere(kind, tmp_path):
    config = (FAMILIES | WITHOUT_R1)[ONE_OF_EACH[kind]]
    model = write_model(config, tmp_path / "model", layers=config.num_hidden_layers, dtype=torch.float32)
    r1 = ["rotation.r1=false"] if ONE_OF_EACH[kind] in WITHOUT_R1 else []
    words = tiny_run(tmp_path, "optimize.steps=0", "model.dtype=float32", *NO_HAD, *W4A16, *CACHE16, *r1, model=model)
    make_run(words, "quantize")
    original = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    whole = AutoModelForCausalLM.from_pretrained(exported(words, "hf"), dtype=torch.float32)
    assert relative(logits(whole), original) < 1e-4
    packed = exported(words, "compressed-tensors")
    ours = logits(dist_spin.load(packed, "cpu"))
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
    assert relative(logits(AutoModelForCausalLM.from_pretrained(packed, **how)), ours) < 1e-5
    assert 1e-2 < relative(ours, original) < 1.5
    # vLLM's Llama, which Gemma 1 is exported as, knows no GELU, and of packed experts none was tried: nothing is promised.
    promise = dict.fromkeys(("gemma", *EXPERT_FAMILIES), "not tried with this format or family")
    promise["cohere2"] = "vLLM, up to the length of a window."
    assert promise.get(kind, "serves it with vLLM.") in (packed / "README.md").read_text()


def refusal(place: Path, config: dict[str, object]) -> str:
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        open_model(str(place))
    return str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_cannot_be_rotated_is_refused_in_one_line(kind, tmp_path):
    line = refusal(tmp_path, {"model_type": kind})
    assert f"'{kind}' is not supported: {REFUSED[kind]}" in line
    assert "use one of llama" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gemma-2b (2048, 16384)", "silu in a llama's MLP, not gelu"),
        ("phi-3.5-mini (3072, 8192)", "rope_type=longrope in a mistral"),
        ("phi-4-14b (5120, 17920)", ""),
        ("phi-3-mini-4k (3072, 8192)", "gives a mistral no sliding window, but it has one of 7"),
        ("mistral-7b-v0.1 (4096, 14336)", "gives a mistral no sliding window, but it has one of 7"),
        ("ministral-8b (4096, 12288)", "gives a ministral no sliding window, but it has one of 7"),
    ],
)
def test_llama_cpp_is_not_given_what_it_would_compute_otherwise(name, problem, tmp_path):
    model = write_model(FAMILIES[name], tmp_path)
    config = load_config(None, [f"model.path={model}", "rotation.online=false"])
    found = [error.problem for error in conflicts("gguf", config, open_model(str(model)).config, starting=True)]
    assert len(found) == bool(problem)
    assert problem in "".join(found)
