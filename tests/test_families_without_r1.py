"""Families whose norms do not commute with R1: R2, R3 and R4 change nothing but what is quantised, and R1 is refused."""

import json
from collections.abc import Iterator

import pytest
import torch
from families import ONE_OF_EACH, WITHOUT_R1, assert_a_layer_from_disk_computes, assert_codes_are_the_oracles
from test_model import CPU, learning_model, merged_logits, online_sites, reference_logits, relative
from tiny import tiny_run, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dist_spin
from dist_spin.cli import main
from dist_spin.model.architecture import LAYER_LINEARS, norm_eps
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.rotation import Blocks, Rotations, initial
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.numerics.cayley import tangent
from dist_spin.numerics.gptq import GPTQOptions
from dist_spin.quantize.layer_quantizer import LayerQuantizer
from dist_spin.runtime import distributed

WIDE = torch.float64
NO_R1 = Blocks(1)
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
RUNS = ("gemma-2-2b (2304, 9216)", "gemma-3-270m (640, 2048)", "olmo-2-32b (5120, 27648)", "command-r7b (4096, 14336)")


@pytest.fixture(scope="module", params=WITHOUT_R1)
def files(request, tmp_path_factory) -> ModelFiles:
    return open_model(str(write_model(WITHOUT_R1[request.param], tmp_path_factory.mktemp("model"))))


@pytest.fixture
def alone() -> Iterator[distributed.World]:
    yield distributed.start("cpu", threads=1)
    distributed.stop()


def test_the_function_is_transformers_own_and_preserved(files):
    plain = merged_logits(files, None, Sites(), IDS, WIDE)
    # Gemma 2 has no SDPA there, and its softmax is in fp32.
    assert relative(plain, reference_logits(files, IDS, WIDE)) < (1e-6 if files.config.model_type == "gemma2" else 1e-9)
    rotations = initial("orthogonal", files.shape, 3, NO_R1)
    assert relative(merged_logits(files, rotations, online_sites(files, 16), IDS, WIDE), plain) < 1e-9
    moved = files.weights.rows("model.layers.0.self_attn.v_proj.weight")
    merged = RotatedWeights(files.weights, files.shape, rotations, (), CPU, WIDE).layer(0)
    assert relative(merged["self_attn.v_proj.weight"], moved) > 0.1


def merged_by_autograd(files: ModelFiles, r2: Tensor, sites: Sites) -> Tensor:
    """The mean loss with every weight rotated in the forward pass by R2 [layers, d, d], in plain autograd."""
    weights = RotatedWeights(files.weights, files.shape, None, (), CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=False)
    hidden, shape = weights.embedded(IDS), files.shape
    for i in range(shape.layers):
        stored = weights.layer(i)
        layer = runner.build(i, stored)
        rotated = {
            "self_attn.v_proj.linear.weight": torch.block_diag(*[r2[i]] * shape.kv_heads).T
            @ stored["self_attn.v_proj.weight"],
            "self_attn.o_proj.linear.weight": stored["self_attn.o_proj.weight"]
            @ torch.block_diag(*[r2[i]] * shape.heads),
            "mlp.down_proj.linear.weight": stored["mlp.down_proj.weight"] @ torch.kron(*sites.r4)
            if len(sites.r4) == 2
            else stored["mlp.down_proj.weight"] @ sites.r4[0],
        }
        call = runner.context(i, hidden) | {"use_cache": False}
        hidden = torch.func.functional_call(layer, rotated, hidden, call)
    head = weights.head(norm_eps(files.config))
    logits = shape.scaling.logits_of(head.norm(hidden) @ head.weight.T)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_attached_r2_is_the_merged_one_and_so_are_its_gradients(files):
    r1, r2 = initial("hadamard", files.shape, 5, NO_R1)
    sites = online_sites(files, 4)
    rotations = Rotations(r1, r2, CPU, WIDE, learn=True)
    loss = learning_model(files, rotations, sites, WIDE)(IDS).mean()
    loss.backward()
    logits = merged_logits(files, (r1, r2), sites, IDS, WIDE)
    merged = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, merged, rtol=1e-9, atol=0)
    oracle = r2.clone().requires_grad_()
    merged_by_autograd(files, oracle, sites).backward()
    assert relative(tangent(rotations.lie_grad2), tangent(oracle.grad @ r2.mT)) < 1e-9
    assert float(tangent(rotations.lie_grad2).norm()) > 1e-3
    assert not rotations.lie_grad1.any()


def test_a_teacher_and_the_gradient_of_its_divergence(files):
    """The KL divergence from the full-precision model: 0 without quantisers, and its gradient that of a difference."""
    r1, r2 = initial("hadamard", files.shape, 5, NO_R1)
    exact = learning_model(files, Rotations(r1, r2, CPU, WIDE), online_sites(files, 16), WIDE, teacher_share=1.0)
    with torch.no_grad():
        assert float(exact(IDS).abs().max()) < 1e-12
    hidden = torch.randn(1, 6, files.shape.hidden, dtype=WIDE, generator=torch.Generator().manual_seed(2))
    teacher = hidden + 0.3 * hidden.flip(1)
    with torch.no_grad():
        stored = exact.head(None, teacher, IDS[:1, :6], top_k=5)
    for told in (teacher, stored):  # all of it, or its most probable tokens
        turn = torch.zeros((), dtype=WIDE, requires_grad=True)
        exact.head(hidden + turn * hidden.flip(2), told, IDS[:1, :6]).sum().backward()
        step = 1e-5
        with torch.no_grad():
            up, down = (exact.head(hidden + s * step * hidden.flip(2), told, IDS[:1, :6]).sum() for s in (1, -1))
        assert float(turn.grad) == pytest.approx(float(up - down) / (2 * step), rel=1e-5, abs=1e-7)


def test_layers_are_quantised_and_reload_as_they_were(files, alone, tmp_path, request):
    sites = online_sites(files, 16)
    source = RotatedWeights(files.weights, files.shape, initial("hadamard", files.shape, 0, NO_R1), sites.r4, CPU, WIDE)
    runner = LayerRunner(files.config, sites, device=CPU, dtype=WIDE, rotated=True)
    quantizer = LayerQuantizer(runner, alone, "gptq", GPTQOptions(), WIDE)
    generator = torch.Generator().manual_seed(0)
    last = files.shape.layers - 1
    hidden = [torch.randn(1, 20, files.shape.hidden, generator=generator, dtype=WIDE) for _ in range(6)]
    entered, weights = list(hidden), source.layer(last)
    made = quantizer.quantize(last, weights, hidden)
    assert set(made.quantized_weights) == set(LAYER_LINEARS)
    assert all(0 < f["error"] < f["rtn_error"] < 1 for f in made.figures.values())
    assert_a_layer_from_disk_computes(tmp_path, runner, last, made, entered, hidden)
    if request.node.callspec.params["files"] in ONE_OF_EACH.values():
        assert_codes_are_the_oracles(runner, last, made, weights, entered)


def logits_of(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_r2_and_its_exports_load_elsewhere(name, tmp_path, capsys):
    model = write_model(WITHOUT_R1[name], tmp_path / "model")
    settings = tiny_run(tmp_path, "rotation.r1=false", "model.dtype=float32", "export.profile=no-had", model=model)
    for verb in ("optimize", "quantize", "evaluate"):
        assert main([verb, *settings]) == 0
    capsys.readouterr()
    assert main(["report", *settings]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- Rotations: R2, online R3, R4; start" in report
    assert "largest entry of |RRᵀ − I|: R2" in report
    assert main(["export", *settings, "rotation.online=false", "export.target=hf"]) != 0  # learned with R4
    settings = tiny_run(
        tmp_path, "rotation.r1=false", "rotation.online=false", "model.dtype=float32", "export.profile=no-had", "name=two",
        model=model,
    )  # fmt: skip
    for verb in ("optimize", "quantize"):
        assert main([verb, *settings]) == 0
    assert main(["export", *settings, "export.target=hf"]) == 0
    (sidecar,) = (tmp_path / "two").rglob("dist_spin.json")
    export = sidecar.parent
    stored = json.loads((export / "config.json").read_text())
    assert stored["model_type"] == WITHOUT_R1[name].model_type
    assert stored["tie_word_embeddings"] == WITHOUT_R1[name].tie_word_embeddings
    original = logits_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert relative(logits_of(AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)), original) < 1e-4
    loaded = dist_spin.load(export, "cpu").double()
    assert 1e-3 < relative(logits_of(loaded), original) < 1.5  # with its quantisers
    cached, plain = (loaded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([], "R1 cannot rotate a gemma3_text: norms with a gain"),
        (
            ["rotation.r1=false", "optimize.scales=true"],
            "optimize.scales=true needs R1, which rotation.r1=false leaves out; set",
        ),
        (
            ["rotation.r1=false", "optimize.w_bits=4"],
            "optimize.w_bits=4 needs R1, which rotation.r1=false leaves out; set",
        ),
        (["rotation.r1=false", "rotation.init=range"], "rotation.init=range fits R1"),
        (
            ["rotation.r1=false", "rotation.online=false", "export.target=gguf"],
            "what llama.cpp computes of a gemma3_text",
        ),
    ],
)
def test_what_needs_r1_is_refused_in_one_line(changes, line, tmp_path, capsys):
    model = write_model(WITHOUT_R1["gemma-3-270m (640, 2048)"], tmp_path / "model")
    capsys.readouterr()
    assert main(["optimize", *tiny_run(tmp_path, *changes, model=model)]) != 0
    said = "".join(capsys.readouterr())
    assert line in said
    assert "Traceback" not in said
    if "export.target=gguf" not in changes:  # which plan does not look at
        assert main(["plan", *tiny_run(tmp_path, *changes, model=model)]) == 2
        assert line in capsys.readouterr().err
