"""Bits of single linears and of the two ends: what the files hold, what evaluation reads, what a second start does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_run
from transformers import AutoModelForCausalLM

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.data import load_tokens
from dist_spin.errors import UserError
from dist_spin.model.architecture import EMBEDDING, LAYER_LINEARS
from dist_spin.model.weights import open_model
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.storage.quantized_layers import layer_path, load_embeddings, load_layer
from dist_spin.storage.run_directory import LEARNED, RunDir
from dist_spin.storage.tensor_file import load_tensors, save_tensors

DOWN = "mlp.down_proj"

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model, tokens, and a run beside it whose rotations are learned."""
    place = tmp_path_factory.mktemp("model")
    assert main(["optimize", *settings(place, place), "quant.a_bits=8"]) == 0
    return place


def settings(model: Path, output: Path) -> list[str]:
    """A short run with 16-bit activations, so that weights alone decide what is measured."""
    widths = (f"quant.{which}_bits=16" for which in "akv")
    return tiny_run(output, "quantize.baselines=[none]", *widths, model=model)


@pytest.fixture
def words(model, tmp_path) -> list[str]:
    """Settings of a run whose rotations are learned."""
    shutil.copytree(model / "run", tmp_path / "run")
    return settings(model, tmp_path)


def stamps(run: RunDir) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in run.path.rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_down_proj_has_its_own_bits(words, tmp_path, method):
    words = [*words, f"quantize.method={method}"]
    run = RunDir(tmp_path / "run")
    assert main(["quantize", *words]) == 0
    four = {variant: load_layer(layer_path(run.layers(variant), 0))[0] for variant in (LEARNED, "none")}
    before = stamps(run)
    assert main(["quantize", *words, "quant.down_bits=4"]) == 0
    assert stamps(run) == before  # the same, said otherwise

    assert main(["quantize", *words, "quant.down_bits=8"]) == 0
    for variant in (LEARNED, "none"):
        layer, _ = load_layer(layer_path(run.layers(variant), 0))
        assert layer.bits == {role: 8 if role == DOWN else 4 for role in LAYER_LINEARS}
        for role, quantized in layer.quantized_weights.items():
            widest = int(quantized.codes.abs().max())
            assert 100 < widest <= 128 if role == DOWN else 7 <= widest <= 8, role
            if role != DOWN:  # nothing before down_proj knows of its bits
                torch.testing.assert_close(quantized.codes, four[variant].quantized_weights[role].codes, rtol=0, atol=0)
        assert layer.figures[DOWN]["error"] < four[variant].figures[DOWN]["error"] / 50  # 16 times finer, squared
    before = stamps(run)
    assert main(["quantize", *words, "quant.down_bits=8"]) == 0
    assert stamps(run) == before


def test_sweeps_and_norm_of_the_clip_search_decide_layers(words, tmp_path):
    run = RunDir(tmp_path / "run")
    found = []
    for setting in ("quantize.sweeps=0", "quantize.sweeps=2", "quantize.clip_norm=2"):
        assert main(["quantize", *words, setting]) == 0
        found.append(load_layer(layer_path(run.layers("none"), 0))[0])
        before = stamps(run)
        assert main(["quantize", *words, setting]) == 0
        assert stamps(run) == before
    plain, swept, clipped = found
    for role in ("self_attn.q_proj", "self_attn.v_proj"):  # what later linears meet depends on these
        assert torch.equal(swept.quantized_weights[role].scale, plain.quantized_weights[role].scale)
        assert swept.figures[role]["error"] < plain.figures[role]["error"]
        assert not torch.equal(clipped.quantized_weights[role].scale, plain.quantized_weights[role].scale)


def test_learned_rotations_do_not_depend_on_bits_of_weights(words, tmp_path):
    before = stamps(RunDir(tmp_path / "run"))
    assert main(["optimize", *words, "quant.a_bits=8", "quant.down_bits=8", "quant.head_bits=8"]) == 0
    assert stamps(RunDir(tmp_path / "run")) == before


def test_evaluation_measures_what_the_files_hold(words, tmp_path, model, capfd):
    run = RunDir(tmp_path / "run")
    words = [*words, "quant.down_bits=8"]
    assert main(["quantize", *words]) == 0
    layers = stamps(run)
    words += ["quant.embedding_bits=3", "quant.head_bits=8"]
    assert main(["evaluate", *words]) == 2
    assert "run `dist-spin quantize` first" in capfd.readouterr().err
    assert main(["quantize", *words]) == 0
    ends = {str(run.layers(variant) / "ends.safetensors") for variant in (LEARNED, "none")}
    assert stamps(run).keys() - layers.keys() == ends
    assert {path: stamp for path, stamp in stamps(run).items() if path not in ends} == layers
    done = stamps(run)
    assert main(["quantize", *words]) == 0
    assert stamps(run) == done

    assert main(["evaluate", *words]) == 0
    # transformers' norms compute in fp32, hence the tolerance.
    measured = {(r["rotation"], r["weights"]): r["ppl"] for r in json.loads((run.path / "results.json").read_text())}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokens = load_tokens(f"tokens:{model / 'tokens.npy'}", "test", 20, None)
    assert measured["none", "none"] == pytest.approx(perplexity(reference, tokens), rel=1e-5)
    for index, layer in enumerate(reference.model.layers):
        held, _ = load_layer(layer_path(run.layers("none"), index))
        layer.load_state_dict(held.weights(torch.float64, torch.device("cpu")), strict=False)
    held_ends, _ = load_embeddings(run.layers("none") / "ends.safetensors")
    for end, module in (("embedding", reference.model.embed_tokens), ("head", reference.lm_head)):
        module.weight = torch.nn.Parameter(dequantize_weight(*held_ends[end], dtype=torch.float64))
    assert measured["none", "gptq"] == pytest.approx(perplexity(reference, tokens), rel=1e-5)


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    logits = model(tokens).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).double().exp().item()


def test_ends_are_rounded_to_the_nearest_code(words, tmp_path, model):
    # Without the clipping search no value lies beyond the codes.
    words = [*words, "quant.embedding_bits=3", "quant.head_bits=8", "quant.w_mse_clip=false", "quantize.method=rtn"]
    path = RunDir(tmp_path / "run").layers("none") / "ends.safetensors"
    assert main(["quantize", *words]) == 0
    source = open_model(str(model), revision=None, dtype=torch.float64).weights
    ends, _ = load_embeddings(path)
    weight = source.rows(f"{EMBEDDING}.weight")  # lm_head is tied to it
    for end, highest in (("embedding", 3), ("head", 127)):
        quantized = ends[end]
        assert quantized.codes.shape == weight.shape
        assert quantized.scale.shape == (len(weight), 1)
        assert int(quantized.codes.max()) == highest
        error = (dequantize_weight(*quantized, dtype=torch.float64) - weight).abs()
        assert (error <= quantized.scale * (0.5 + 1e-9)).all()
        assert error.max() > 0.4 * quantized.scale.min()
    assert main(["quantize", *words, "quant.w_mse_clip=true"]) == 0
    clipped, _ = load_embeddings(path)
    assert (clipped["embedding"].scale <= ends["embedding"].scale).all()
    assert (clipped["embedding"].scale < ends["embedding"].scale).any()


def test_damaged_ends_are_set_aside_and_made_again(words, tmp_path, capfd):
    words = [*words, "quant.head_bits=8", "quantize.method=rtn"]
    assert main(["quantize", *words]) == 0
    path = RunDir(tmp_path / "run").layers("none") / "ends.safetensors"
    whole = path.read_bytes()
    tensors, metadata = load_tensors(path)
    assert sorted(tensors) == ["head.codes", "head.scale"]
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["quantize", *words]) == 0
    assert "kept as ends.stale, making it again" in capfd.readouterr().err
    assert path.read_bytes() == whole
    save_tensors(path, tensors, {**metadata, "fingerprint": "of another model"})
    assert main(["quantize", *words]) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["quant.down_bits=16"], "use 2 to 8 bits, or 0 for the same as quant.w_bits"),
        (["quant.head_bits=0"], "use 2 to 8 bits, or 16 = off"),
        (["quant.embedding_bits=9"], "use 2 to 8 bits, or 16 = off"),
        (["quant.w_bits=16", "quant.down_bits=8"], "quant.w_bits=16 leaves all weights as they are, so use 0"),
        (["quant.w_bits=16", "quant.head_bits=8"], "quant.w_bits=16 leaves all weights as they are, so use 16"),
    ],
)
def test_bits_that_cannot_be(settings, remedy):
    with pytest.raises(UserError) as caught:
        load_config(None, ["model.path=x", *settings])
    assert caught.value.remedy == remedy
