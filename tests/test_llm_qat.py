"""LLM-QAT: the loss falls, what is rounded afterwards is what training saw, and a stopped training goes on as if it had not."""

import dataclasses
import json

import pytest
import torch
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.compare.method_variants import learn, method_variant
from dist_spin.compare.methods import llm_qat_training
from dist_spin.compare.methods.llm_qat import symmetric
from dist_spin.compare.methods.llm_qat_student import Student, divergence, predictions
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted, UserError
from dist_spin.evaluate.perplexity import window_losses
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.model.layers import LayerRunner
from dist_spin.model.rotated_weights import RotatedWeights
from dist_spin.model.sites_config import Sites
from dist_spin.pipeline.fingerprints import layer_fingerprint
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.quant_sites import sites_for
from dist_spin.pipeline.self_generated_text import self_text
from dist_spin.pipeline.variants import build_variant
from dist_spin.quantize.job import QuantizeJob
from dist_spin.quantize.layer_range import quantize_range
from dist_spin.runtime import distributed
from dist_spin.runtime.distributed import World
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.quantized_layers import load_layer
from dist_spin.storage.run_directory import run_dir
from dist_spin.storage.tensor_file import load_tensors

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
pytestmark = pytest.mark.usefixtures("group_of_one", "restored_process")


def settings(directory, *more, kind="gqa_tied"):
    sizes = ["quantize.n_sequences=8", "quantize.seq_len=24", "quantize.method=rtn"]
    learning = ["methods.qat_steps=30", "methods.qat_batch_size=4", "methods.qat_lr=2e-3"]
    return tiny_run(directory / "runs", *sizes, *learning, *more, model=directory / "model", kind=kind, split="#all")


def prepared(directory, *more, kind="gqa_tied"):
    config = load_config(None, settings(directory, "quantize.source=self", *more, kind=kind))
    files = open_configured_model(config)
    q = config.quantize
    return config, files, self_text(config, files, q.n_sequences, q.seq_len, q.seed)


def student_of(config, files, sites, options=None):
    kind = {"device": CPU, "dtype": torch.float64}
    plain = RotatedWeights(files.weights, files.shape, None, (), **kind)
    exact, quantized = (LayerRunner(files.config, s, rotated=False, **kind) for s in (Sites(), sites))
    tied = files.config.tie_word_embeddings
    return Student(quantized, plain, options or {}, tied=tied), lambda tokens: predictions(exact, plain, tokens)


def trained(config, files, tokens):
    """The method's variant, after training."""
    learn(config, ALONE, files, "llm_qat")
    return method_variant(config, files, "llm_qat", CPU, tokens)


@pytest.mark.parametrize("kind", ["gqa_tied", "biases", "qwen3", "mistral_window"])
def test_without_quantisers_the_student_is_the_teacher(kind, tmp_path):
    config, files, tokens = prepared(tmp_path, kind=kind)
    student, teacher = student_of(config, files, Sites())
    loss = student.loss(tokens, teacher(tokens))
    assert abs(float(loss.detach())) < 1e-12
    loss.backward()
    assert max(float(g.abs().max()) for g in student.gradients()) < 1e-9


def test_divergence_and_its_gradients_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr("dist_spin.compare.methods.llm_qat_student.LOGITS_AT_ONCE", 11 * 3)  # three tokens at a time
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 5, 6), (11, 6), (2, 5, 6), (11, 6))
    h, w, t, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    h.requires_grad_(), w.requires_grad_()
    loss = divergence(h, w, t, v)
    p, q = (t @ v.T).softmax(-1), (h @ w.T).softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    both = [torch.autograd.grad(x, (h, w)) for x in (loss, expected)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_weight_is_trained_and_the_loss_falls(tmp_path):
    config, files, tokens = prepared(tmp_path)
    variant = trained(config, files, tokens)
    assert variant.sites.a.symmetric
    paths = [variant.method.path(index) for index in range(files.shape.layers + 1)]
    figures = json.loads(load_tensors(paths[0])[1]["figures"])
    assert figures["last_loss"] < 0.7 * figures["first_loss"]
    assert not (variant.method.directory / "training.safetensors").exists()
    plain = RotatedWeights(files.weights, files.shape, None, (), CPU, torch.float64)
    for index in range(files.shape.layers):
        before, after = plain.layer(index), variant.weights.layer(index)
        assert before.keys() == after.keys()
        for name, w in before.items():
            assert 1e-4 < float((after[name] - w).abs().mean()) < 0.1, name
    for end in ("embedding", "head_weight", "final_gain"):
        before, after = getattr(plain, end)(), getattr(variant.weights, end)()
        assert 1e-4 < float((after - before).abs().mean()) < 0.1, end
    assert torch.equal(variant.weights.embedding(), variant.weights.head_weight())  # tied weights stay so


def test_what_is_rounded_and_measured_is_what_training_saw(tmp_path):
    """The product's own rounding gives the weights that the student last saw, and the same loss."""
    config, files, tokens = prepared(tmp_path, "methods.qat_steps=5", kind="biases")
    variant = trained(config, files, tokens)
    quantize_range(QuantizeJob(config, ALONE, files, variant, tokens, StopRequest()), 0, files.shape.layers)
    student, _ = student_of(config, files, variant.sites, variant.method.method.weight_options)
    for index in range(files.shape.layers + 1):
        prefix = "" if index == files.shape.layers else f"{index}."
        for name, w in variant.method.state(index).items():
            student.masters[f"{prefix}{name}"].copy_(w)
    student.update_parameters()
    directory = run_dir(config).layers("llm_qat")
    for index in range(files.shape.layers):
        layer = load_layer(directory / f"{index:03d}.safetensors")[0]
        for name, w in layer.weights(torch.float64, CPU).items():
            assert torch.equal(w, student.parameters[f"{index}.{name}"]), name
        assert len(student.parameters[f"{index}.self_attn.q_proj.weight"][0].unique()) <= 15
    target = EvalTarget(variant, "rtn", fingerprint=layer_fingerprint(config, files, variant, tokens))
    (losses,) = window_losses(config, ALONE, files, target, [(variant.sites, tokens)], "text")
    with torch.no_grad():
        hidden = torch.nn.functional.embedding(tokens, student.parameters["embedding"])
        for index, layer in enumerate(student.layers):
            hidden = student.runner.run(layer, index, hidden)
        logits = student.norm(hidden) @ student.parameters["head"].T
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-9, atol=0)


def test_it_comes_nearer_to_the_model_than_rounding_alone(tmp_path):
    more = ("quantize.n_sequences=256", "methods.qat_steps=100", "methods.qat_batch_size=8", "methods.qat_lr=1e-3")
    config, files, tokens = prepared(tmp_path, *more)
    variant = trained(config, files, tokens)
    untrained = build_variant(config, files, "none", CPU)
    untrained = dataclasses.replace(untrained, sites=symmetric(untrained.sites))
    apart = {}
    for each in (variant, untrained):
        quantize_range(QuantizeJob(config, ALONE, files, each, tokens, StopRequest()), 0, files.shape.layers)
        student, teacher = student_of(config, files, each.sites)
        for index in range(files.shape.layers):
            layer = load_layer(run_dir(config).layers(each.name) / f"{index:03d}.safetensors")[0]
            for name, w in layer.weights(torch.float64, CPU).items():
                student.masters[f"{index}.{name}"].copy_(w)
        student.masters["embedding"].copy_(each.weights.embedding())
        student.masters["norm"].copy_(each.weights.final_gain())
        student.update_parameters()
        fresh = self_text(config, files, 8, 24, 7)  # other text of the same model
        apart[each.name] = float(student.loss(fresh, teacher(fresh)).detach())
    assert apart["llm_qat"] < 0.9 * apart["none"], apart


def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config, files, tokens = prepared(tmp_path, "methods.qat_steps=6", "name=whole")
    whole = trained(config, files, tokens).method
    other = dataclasses.replace(config, name="parts")
    asked = StopRequest()
    asked.name = "SIGTERM"
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"after step {step} "):
            learn(other, ALONE, files, "llm_qat", stop=asked)
    parts = method_variant(other, files, "llm_qat", CPU, tokens).method
    assert [path.name for path in parts.directory.iterdir()] == ["training.safetensors"]
    monkeypatch.setattr(llm_qat_training, "SAVE_EVERY", -1.0)  # a state after every step
    learn(other, ALONE, files, "llm_qat")
    expected = [whole.path(index).read_bytes() for index in range(files.shape.layers + 1)]
    assert [parts.path(index).read_bytes() for index in range(files.shape.layers + 1)] == expected
    times = [parts.path(index).stat().st_mtime_ns for index in range(files.shape.layers + 1)]
    learn(other, ALONE, files, "llm_qat")  # nothing is done again
    assert [parts.path(index).stat().st_mtime_ns for index in range(files.shape.layers + 1)] == times
    parts.path(1).write_bytes(expected[1][:-9])  # torn: it is noticed, and training starts again
    learn(other, ALONE, files, "llm_qat")
    assert [parts.path(index).read_bytes() for index in range(files.shape.layers + 1)] == expected
    for changed in ("methods.qat_lr=1e-3", "quant.a_bits=8", "quantize.seed=1"):
        again = prepared(tmp_path, "methods.qat_steps=6", changed)[0]
        assert method_variant(again, files, "llm_qat", CPU, tokens).digest != parts.fingerprint, changed


def test_a_model_that_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    config, files, _ = prepared(tmp_path)
    monkeypatch.setattr(llm_qat_training, "host_bytes_free", lambda: 1 << 20)
    with pytest.raises(UserError, match=r"trains all weights at once.* the host has"):
        learn(config, ALONE, files, "llm_qat")


def test_sites_are_symmetric_and_clip_nothing(tmp_path):
    config, files, _ = prepared(tmp_path, "quant.clips=quarot")
    before = sites_for(config, files.shape, rotated=False)
    after = symmetric(before)
    for site in "aokv":
        spec = getattr(after, site)
        assert (spec.symmetric, spec.clip_ratio, spec.bits) == (True, 1.0, 4)
        assert spec.group_size == getattr(before, site).group_size


def test_a_comparison_has_its_row(tmp_path):
    more = ["methods.qat_steps=4", "quantize.n_sequences=4", "quantize.seq_len=20"]
    more += ["compare.methods=[rtn, llm_qat]", "compare.weights=[rtn]", "compare.bits=[W4A4KV4, W16A8]"]
    words = settings(tmp_path, *more)
    config = load_config(None, words)
    for _ in range(2):
        distributed.stop()
        assert main(["compare", *words]) == 0
        rows = json.loads((run_dir(config).path / "results.json").read_text())
        perplexities = {(row["method"], row["w_bits"], row["a_bits"]): row["ppl"] for row in rows}
        assert len(perplexities) == 5
        assert perplexities["LLM-QAT", 4, 4] != perplexities["RTN", 4, 4]
    directories = list((run_dir(config).path / "methods" / "llm_qat").iterdir())
    assert len(directories) == 2  # each width is trained for
