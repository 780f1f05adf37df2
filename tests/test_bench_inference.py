"""`dist-spin bench inference`: its layers are Llama's, its kernels compute the product, its figures are all there."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dist_spin.bench.decoder import Decoder, random_weight
from dist_spin.bench.hadamard_routes import butterfly, routes
from dist_spin.bench.inference import block_hadamard
from dist_spin.bench.linear_kernels import Int8, Unavailable, make, per_token_int8, relative_error
from dist_spin.cli import main
from dist_spin.model.architecture import Shape
from dist_spin.numerics.hadamard import hadamard_core, hadamard_matrix
from dist_spin.numerics.hadamard_transform import kronecker_apply, kronecker_factors
from dist_spin.runtime.cpu_features import int8_is_exact

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)

pytestmark = pytest.mark.usefixtures("restored_process")


def same(function):
    return function


class Exact:
    """A product in fp32, so that nothing but the layer itself is compared. rotated: as a kernel that turns its input itself."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.weight_bytes = weight.float(), weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T

    def rotated(self, x: torch.Tensor, block: int) -> torch.Tensor:
        return self(block_hadamard(block, x.dtype, CPU)(x))


@pytest.fixture(scope="module")
def pair() -> tuple[Decoder, LlamaForCausalLM]:
    """The timed layers and transformers', with the same weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    decoder = Decoder(Shape.of(CONFIG), 2, "bf16", CPU, same, [64])
    for layer, theirs in zip(decoder.layers, model.model.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, Exact(getattr(layer, name).weight))
        a, m = theirs.self_attn, theirs.mlp
        split = layer.qkv.weight.split([a.q_proj.out_features, a.k_proj.out_features, a.v_proj.out_features])
        for linear, weight in zip((a.q_proj, a.k_proj, a.v_proj), split, strict=True):
            linear.weight.copy_(weight)
        for linear, weight in zip((m.gate_proj, m.up_proj), layer.gate_up.weight.chunk(2), strict=True):
            linear.weight.copy_(weight)
        a.o_proj.weight.copy_(layer.o.weight)
        m.down_proj.weight.copy_(layer.down.weight)
    return decoder, model


def test_the_timed_layers_are_llama_layers_in_prefill_and_in_decoding(pair):
    decoder, model = pair
    x = torch.randn(3, 9, 128, generator=torch.Generator().manual_seed(1))
    model.model.norm = torch.nn.Identity()
    theirs = model.model(inputs_embeds=x, use_cache=True)
    torch.testing.assert_close(decoder.run(x), theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    cache = [torch.stack((layer.keys, layer.values)) for layer in theirs.past_key_values.layers]
    for layer in cache:
        layer[:, :, :, -1] = torch.nan  # the decoded token's own place
    torch.testing.assert_close(decoder.run(x[:, -1:], cache), theirs.last_hidden_state[:, -1:], rtol=1e-4, atol=1e-4)


def test_the_hadamards_are_where_a_merge_expects_them(pair):
    decoder, _ = pair
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(2))
    plain = decoder.run(x)
    r3, r4 = (routes(width, torch.float32, CPU, None)[0]["kronecker"] for width in (32, 192))
    turned = [Exact(r4(layer.down.weight)) for layer in decoder.layers]
    assert (decoder.run(x, None, r3, r4) - plain).abs().max() > 0.1  # R4 without its inverse in the weights
    kept = [layer.down for layer in decoder.layers]
    for layer, down in zip(decoder.layers, turned, strict=True):
        layer.down = down
    torch.testing.assert_close(decoder.run(x, None, r3, r4), plain, rtol=1e-4, atol=1e-4)
    for layer, down in zip(decoder.layers, kept, strict=True):
        layer.down = down


def test_r4_in_blocks_is_the_same_as_a_product_of_its_own_and_within_the_kernel(pair):
    decoder, _ = pair
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(2))
    r4 = block_hadamard(64, torch.float32, CPU)
    by_itself = decoder.run(x, None, None, r4)
    assert (by_itself - decoder.run(x)).abs().max() > 0.1
    torch.testing.assert_close(decoder.run(x, None, None, None, 64), by_itself)
    blocks = torch.block_diag(*[hadamard_matrix(64).float() / 8] * 3)
    y = torch.randn(4, 192, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(r4(y), y @ blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "worst"), [("bf16", 4e-3), ("int8", 2e-2), ("w4a8", 0.15)])
def test_kernels_compute_the_product_to_their_bits(name, worst):
    weight = random_weight((96, 256), 0, CPU)
    if name == "int8" and not int8_is_exact():
        with pytest.raises(Unavailable, match="saturate on this CPU"):
            make(name, weight, same, [64])
        return
    kernel = make(name, weight, same, [64])
    assert worst / 10 < relative_error(kernel, weight) < worst
    assert kernel(torch.randn(1, 256)).shape == (1, 96)  # one token
    bits = {"bf16": 16, "int8": 8, "w4a8": 4}[name]
    assert bits <= kernel.weight_bytes * 8 / weight.numel() <= bits + 0.5


@pytest.mark.skipif(not int8_is_exact(), reason="needs VNNI instructions: 8-bit products saturate on this CPU")
def test_int_mm_takes_any_number_of_rows():
    weight = random_weight((40, 64), 0, CPU)
    kernel = Int8(weight, same)
    codes, scale = per_token_int8(weight)
    for tokens in (1, 16, 17, 33):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        mine, mine_scale = per_token_int8(x)
        exact = (mine.double() * mine_scale) @ (codes.double() * scale).T
        torch.testing.assert_close(kernel(x).double(), exact, rtol=5e-3, atol=1e-6)  # the result is bfloat16


@pytest.mark.parametrize("name", ["fp8", "int4", "humming-w4a8", "humming-nvfp4a16"])
def test_kernels_for_other_devices_say_so(name):
    with pytest.raises(Unavailable, match="GPU"):
        make(name, random_weight((32, 128), 0, CPU), same, [64])


@pytest.mark.parametrize("width", [2, 64, 192, 384])
def test_every_route_computes_the_same_transform(width):
    x = torch.randn(5, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = kronecker_apply(x, kronecker_factors(width, dtype=torch.float64))
    core, power = hadamard_core(width)
    signs = hadamard_matrix(core).double() if core > 1 else torch.ones(1, 1).double()
    torch.testing.assert_close(butterfly(x, signs, power, width**-0.5), wanted)
    found, missing = routes(width, torch.float64, CPU, None)
    torch.testing.assert_close(found["kronecker"](x), wanted)
    assert missing.keys() == {"compiled", "fast-hadamard-transform"}


@pytest.mark.slow
def test_the_command_measures_everything_this_machine_has(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--batches", "2,1", "--prefill", "8", "--context", "16", "--json", str(out)]
    words += ["--threads", "1", "--seconds", "0.01"]
    assert main(["bench", "inference", str(tmp_path), *words]) == 0
    figures = json.loads(out.read_text())
    assert figures["kernels"].keys() == {"bf16", "w4a8", *(["int8"] if int8_is_exact() else [])}
    assert figures["skipped"].keys() >= {"fp8", "int4"}
    seen = {(r["phase"], r["batch"], r["kernel"], r["rotation"]) for r in figures["rows"]}
    assert len(seen) == len(figures["rows"]) == 2 * 2 * len(figures["kernels"]) * 2
    for row in figures["rows"]:
        assert row["model_ms"] > 2 * row["layer_ms"] > 0  # two layers and the head
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["model_ms"] * 1e3)
        assert row["speed_over_bf16"] > 0
        assert (row["rotation_cost"] == 0) == (row["rotation"] == "none")
    assert {(h["site"], h["route"]) for h in figures["hadamard"]} == {
        (site, route) for site in ("R3", "R4") for route in ("copy", "kronecker")
    }
    assert all(h["error"] < 1e-5 for h in figures["hadamard"] if h["route"] != "copy")
    printed = capsys.readouterr()
    assert "over bf16" in printed.out
    timed = [line.split() for line in printed.out.splitlines() if line.startswith(("decode", "prefill"))]
    assert {tuple(words[:3]) for words in timed} == {(p, str(b), k) for p, b, k, _ in seen}
    assert all(words[6].endswith("%") for words in timed)  # what the Hadamards add
    assert "skipped fp8: needs a Hopper GPU or later" in printed.err


def test_r4_in_blocks_has_a_column_of_its_own(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    out = tmp_path / "out.json"
    words = ["--device", "cpu", "--kernels", "bf16", "--batches", "1", "--prefill", "0", "--context", "4"]
    words += ["--seconds", "0.001", "--r4-block", "64", "--json"]
    assert main(["bench", "inference", str(tmp_path), *words, str(out)]) == 0
    figures = json.loads(out.read_text())
    assert [row["rotation"] for row in figures["rows"]] == ["none", "R4 in blocks of 64"]  # bf16 turns nothing itself
    assert figures["hadamard"] == []
    assert "with R4 in blocks of 64" in capsys.readouterr().out


def test_what_is_over_the_budget_is_left_out_and_said(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    words = ["--device", "cpu", "--batches", "1", "--prefill", "0", "--context", "4", "--budget", "1e-9"]
    assert main(["bench", "inference", str(tmp_path), *words]) == 0
    printed = capsys.readouterr()
    assert "skipped bf16: over --budget" in printed.out
    assert "model tokens/s" in printed.out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--batches", "0"], "--batches is '0'"),
        (["--kernels", "int2"], "--kernels names 'int2'"),
        (["--r4-block", "128"], "--r4-block is 128; give a power of two up to 64"),
        (["--r4-block", "48"], "--r4-block is 48"),
        (["--device", "cuda"], "there is no CUDA device"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, words, what):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    CONFIG.save_pretrained(tmp_path)
    assert main(["bench", "inference", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert error.count("\n") == 1


def test_a_shape_that_is_not_there(tmp_path, capsys):
    assert main(["bench", "inference", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "none has no config.json" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "worst"),
    [
        ("fp8", 6e-2),
        ("int8", 2e-2),
        ("int4", 0.15),
        ("humming-w4a16", 0.15),
        ("humming-w4a8", 0.15),
        ("humming-w4afp8", 0.15),
        ("humming-nvfp4a16", 0.15),
        ("humming-mxfp4a16", 0.15),
        ("humming-mxfp4afp8", 0.15),
    ],
)
def test_gpu_kernels_compute_the_product_to_their_bits(name, worst):
    weight = random_weight((512, 1024), 0, torch.device("cuda"))
    try:
        kernel = make(name, weight, same, [64])
    except Unavailable as missing:
        pytest.skip(str(missing))
    for tokens in (1, 64):
        assert worst / 10 < relative_error(kernel, weight, tokens) < worst
        if hasattr(kernel, "rotated"):
            turn = block_hadamard(128, torch.float32, weight.device)
            assert worst / 10 < relative_error(kernel, weight, tokens, turn, 128) < worst
