"""`plan` predicts what was measured: every row of docs/performance.md on learning, GPTQ and stages from disk, within 15 %."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig

from dist_spin.bench.plan import evaluated_tokens
from dist_spin.bench.plan_model import (
    GPUS,
    START,
    Hardware,
    gptq_bytes,
    gptq_layer_seconds,
    learning_point,
    optimize,
    parts,
    quantize,
    run_seconds,
    step_seconds,
)
from dist_spin.bench.scaling_model import GIB
from dist_spin.bench.stage_costs import forward_flop, model_bytes
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import UserError
from dist_spin.model.architecture import Shape

ROOT = Path(__file__).parent.parent
SHAPES = {
    name: Shape.of(AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / f"llama-3-{name}"))
    for name in ("8b", "70b")
}
PAGE, MODELS_PAGE = ((ROOT / "docs" / page).read_text() for page in ("performance.md", "models.md"))
# Shape, GPU, how many, sequences of 2048 tokens, weight bits; measured seconds of a step; peak GiB of one GPU, where measured.
LEARNING = [
    ("8b", "h100", 1, 8, 16, 1.22, 47),
    ("8b", "h100", 1, 8, 4, 2.08, 65),
    ("8b", "h200", 1, 8, 16, 1.16, 47),
    ("8b", "h200", 1, 1, 16, 0.190, None),
    ("8b", "h200", 1, 2, 16, 0.305, None),
    ("8b", "h200", 1, 4, 16, 0.584, None),
    ("8b", "h200", 2, 8, 16, 0.63, 40),
    ("8b", "h200", 2, 2, 16, 0.219, None),
    ("8b", "h200", 2, 4, 16, 0.345, None),
    ("70b", "h200", 2, 8, 16, 6.0, 123),
    ("70b", "h200", 4, 8, 16, 2.8, 111),
    ("70b", "h200", 2, 8, 4, 11.7, 110),
    ("70b", "h200", 4, 8, 4, 5.7, 104),
    ("70b", "h200", 2, 2, 16, 1.66, None),
    ("70b", "h200", 1, 8, 16, 12.1, 122),
    ("70b", "h200", 2, 16, 16, 12.10, None),
    ("70b", "h200", 4, 16, 16, 5.65, None),
    ("70b", "h200", 2, 16, 4, 20.79, None),
    ("70b", "h200", 4, 16, 4, 9.85, None),
]
# Shape, layers, GPUs, sequences, ranks that share a copy; seconds of a step, GiB of one GPU: docs/models.md.
MIXTURES = [
    ("qwen3-30b-a3b", 48, 2, 8, 2, 0.643, 64.8),
    ("qwen3-30b-a3b", 4, 2, 8, 2, 0.096, None),
    ("qwen3-30b-a3b", 4, 2, 8, 1, 0.085, None),
    ("qwen3-235b-a22b", 2, 2, 8, 2, 0.143, 21.4),
    ("qwen3-235b-a22b", 2, 2, 8, 1, 0.115, None),
    ("qwen3-235b-a22b", 2, 2, 2, 2, 0.081, 20.5),
]
PREDICTED = [
    (16, 8, 1.63),
    (16, 16, 2.90),
    (4, 8, 3.05),
    (4, 16, 4.89),
]  # 70B on 8 GPUs: bits, sequences, by `bench scaling`
GPTQ = [
    ("70b", "h200", 3.0, 33),
    ("70b", "h200", 2.88, 34.8),
    ("8b", "h200", 0.68, 13.3),
]  # a layer, 128 sequences, one GPU
# Part, settings, seconds of its command from start to end; files in memory.
COMMANDS_70B_5_LAYERS = [
    ("quantize", "quantize.layers_per_job=3", 37.2),
    ("evaluate", "evaluate.max_sequences=8", 11.3),
    ("export", "export.target=compressed-tensors", 16.3),
    ("export", "export.target=hf", 18.0),
]
# Seconds of each stage of the 8B shape within one command, without starting and ending its processes.
RUN_8B = {"optimize": 114.8, "quantize": 25.6, "evaluate": 4.8, "report": 17.4, "export": 8.6}
WHOLE_RUN_8B = 185  # seconds of all that


def settings(*words: str) -> RunConfig:
    return load_config(None, ["model.path=nothing", "quant.w_bits=4", *words])


def machine(kind: str, gpus: int, host: float = 128.0, disk: float = 2e9) -> Hardware:
    return Hardware(gpus, GPUS[kind], host * GIB, disk)


@pytest.mark.parametrize(("shape", "kind", "gpus", "sequences", "bits", "seconds", "peak"), LEARNING)
def test_learning_takes_what_was_measured(shape, kind, gpus, sequences, bits, seconds, peak):
    config = settings(f"optimize.batch_size={sequences}", f"optimize.w_bits={bits}")
    hardware = machine(kind, gpus)
    point, offloaded = learning_point(config, SHAPES[shape], hardware)
    assert step_seconds(config, SHAPES[shape], point, offloaded, hardware) == pytest.approx(seconds, rel=0.15)
    assert re.search(rf"(?<![\d.]){re.escape(f'{seconds:.3f}'.rstrip('0'))}0?(?!\d)", PAGE)  # the row is the page's
    assert (offloaded > 0) == (shape == "70b" and gpus == 1)
    part = optimize(config, SHAPES[shape], hardware)
    assert not part.lacks
    if peak is not None:
        assert part.gpu / GIB == pytest.approx(peak, rel=0.15 if bits == 16 else 0.2)  # see plan_model


@pytest.mark.parametrize(("name", "layers", "gpus", "sequences", "shards", "seconds", "peak"), MIXTURES)
def test_learning_through_experts_takes_what_was_measured(name, layers, gpus, sequences, shards, seconds, peak):
    shape = dataclasses.replace(Shape.of(AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / name)), layers=layers)
    config = settings(f"optimize.batch_size={sequences}", f"distributed.shard_ranks={shards}")
    hardware = machine("h200", gpus)
    point, offloaded = learning_point(config, shape, hardware)
    assert point.levels == {"none": layers}
    assert step_seconds(config, shape, point, offloaded, hardware) == pytest.approx(seconds, rel=0.15)
    assert f"{seconds} s" in MODELS_PAGE
    if peak is not None:  # as above, more is planned than was used
        assert peak < optimize(config, shape, hardware).gpu / GIB < 1.21 * peak


@pytest.mark.parametrize(("bits", "sequences", "seconds"), PREDICTED)
def test_eight_gpus_are_predicted_as_by_the_fit_to_two(bits, sequences, seconds):
    config = settings(f"optimize.batch_size={sequences}", f"optimize.w_bits={bits}")
    hardware = machine("h200", 8)
    point, _ = learning_point(config, SHAPES["70b"], hardware)
    assert step_seconds(config, SHAPES["70b"], point, 0, hardware) == pytest.approx(seconds, rel=0.15)


def test_one_gpu_keeps_the_layers_in_host_memory_that_were_measured():
    assert learning_point(settings(), SHAPES["70b"], machine("h200", 1, host=126))[1] == pytest.approx(31, abs=1)


@pytest.mark.parametrize(("shape", "kind", "seconds", "peak"), GPTQ)
def test_gptq_takes_what_was_measured(shape, kind, seconds, peak):
    tokens = 128 * 2048
    predicted = gptq_layer_seconds(SHAPES[shape], tokens, 2048, GPUS[kind].speed)
    assert sum(predicted.values()) == pytest.approx(seconds, rel=0.15)
    assert gptq_bytes(SHAPES[shape], tokens) / GIB == pytest.approx(peak, rel=0.15)


def as_measured(width: int, *words: str) -> RunConfig:
    """The settings of `bench pipeline`."""
    return settings(
        *("quant.a_symmetric=true", "export.profile=r4-block", f"rotation.r4_block={width & -width}"),
        *("evaluate.sources=[tokens:x.npy]", *words),
    )


@pytest.mark.parametrize(("part", "words", "seconds"), COMMANDS_70B_5_LAYERS)
def test_a_command_takes_what_was_measured(part, words, seconds):
    shape = dataclasses.replace(SHAPES["70b"], layers=5)
    planned = parts(as_measured(shape.intermediate, words), shape, machine("h200", 1, disk=3e9), 8 * 2048)
    assert planned[part].seconds == pytest.approx(seconds, rel=0.15)
    assert f"{seconds} s" in PAGE


def test_a_whole_run_takes_what_was_measured():
    config = as_measured(SHAPES["8b"].intermediate, "export.target=compressed-tensors")
    planned = parts(config, SHAPES["8b"], machine("h200", 1, disk=1.4e9), 8 * 2048)
    assert {name: part.seconds - START for name, part in planned.items()} == pytest.approx(RUN_8B, rel=0.15)
    assert run_seconds(planned) == pytest.approx(WHOLE_RUN_8B, rel=0.15)
    assert all(f"{seconds} s" in PAGE for seconds in [*RUN_8B.values(), WHOLE_RUN_8B])


def test_jobs_on_several_gpus_are_faster_than_all_of_them_on_one_layer():
    alone, together = (quantize(settings(), SHAPES["70b"], machine("h200", gpus, 900)) for gpus in (1, 4))
    jobs = quantize(settings("quantize.layers_per_job=20"), SHAPES["70b"], machine("h200", 4, 900))
    assert jobs.seconds < together.seconds < alone.seconds
    assert alone.seconds == pytest.approx(80 * 3.0 + 10, rel=0.15)
    assert jobs.disk > alone.disk + 3 * 128 * 2048 * 8192 * 2 * 0.99  # stored states of three jobs


def test_more_of_anything_takes_no_less():
    base = parts(settings("export.target=hf"), SHAPES["8b"], machine("h100", 1), 2048)
    assert list(base) == ["optimize", "quantize", "evaluate", "report", "export"]
    for name, words in {
        "optimize": ["optimize.scales=true", "optimize.objective=kl"],
        "quantize": ["quantize.baselines=[none]"],
        "evaluate": ["evaluate.unquantized_weights=true"],
    }.items():
        more = parts(settings(*words), SHAPES["8b"], machine("h100", 1), 2048)
        assert more[name].seconds > base[name].seconds
    apart = sum(part.seconds for part in base.values())
    assert run_seconds(base) < apart
    assert run_seconds({"optimize": base["optimize"]}) == base["optimize"].seconds


def test_a_stored_teacher_takes_disk_and_shortens_steps():
    hardware, planned, steps = machine("h100", 1), [], []
    for k in (0, 256):
        config = settings("optimize.objective=kl", "optimize.steps=1000", f"optimize.teacher_top_k={k}")
        planned.append(parts(config, SHAPES["8b"], hardware, 2048)["optimize"])
        steps.append(step_seconds(config, SHAPES["8b"], *learning_point(config, SHAPES["8b"], hardware), hardware))
    assert steps[1] < 0.8 * steps[0]
    assert planned[1].disk - planned[0].disk == 1000 * 8 * 2048 * (256 * 6 + 4)
    assert planned[1].seconds > planned[0].seconds - 1000 * (steps[0] - steps[1])  # the pass that stores it


def test_tuning_takes_the_whole_model_on_each_gpu():
    tuned = settings("quantize.tune_steps=100")
    small, plain = (quantize(c, SHAPES["8b"], machine("h200", 1)) for c in (tuned, settings()))
    assert plain.seconds < small.seconds
    assert not small.lacks
    assert quantize(tuned, SHAPES["70b"], machine("h200", 4, 900)).lacks == "GPU memory"


def test_a_plan_with_tuning_says_to_leave_it_out_and_proposes_no_ranges_of_layers(capsys):
    shape = ROOT / "configs" / "shapes" / "llama-3-70b"
    words = [f"model.path={shape}", "quantize.tune_steps=100", "--gpu", "h200", "--gpus", "4", "--host-memory", "900"]
    assert main(["plan", *words, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not planned["fits"]
    assert any(line.startswith("quantize.tune_steps=0: ") for line in planned["changes"])
    assert not any("layers_per_job" in line for line in planned["changes"])


def test_a_plan_is_printed_with_what_to_change(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    shape = ROOT / "configs" / "shapes" / "llama-3-70b"
    config.write_text(f"model: {{path: '{shape}'}}\nquant: {{w_bits: 4}}\ndistributed: {{offload_layers: 0}}\n")
    words = ["plan", str(config), "--gpu", "h100", "--host-memory", "500"]
    assert main([*words, "--gpus", "1", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert not one["fits"]
    assert "use 4 GPUs" in one["changes"]
    assert main([*words, "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fits: 80 layers, 141 GB in 16 bits, on 4 GPUs of 79 GiB, 500 GiB")
    assert re.findall(r"^(optimize|quantize|evaluate|all) +\d+", text, re.M) == [
        "optimize",
        "quantize",
        "evaluate",
        "all",
    ]
    assert "quantize.layers_per_job=20" in text
    assert main([*words[:-1], "2", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT into host memory" in text
    assert "- a host with more free memory" in text


@pytest.mark.parametrize(("option", "value"), [("--gpu-memory", "-5"), ("--disk-gb-s", "0"), ("--host-memory", "nan")])
def test_amounts_that_cannot_be_are_refused(option, value, capsys):
    assert main(["plan", "model.path=here", option, value]) == 2
    assert f"{value!r} is no number above 0" in capsys.readouterr().err


def test_tokens_of_texts(tmp_path):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.zeros((7, 100), dtype=np.int64))
    source = f"tokens:{tmp_path / 'ids.npy'}"
    assert evaluated_tokens(settings(f"evaluate.sources=[{source}]")) == 700
    (tmp_path / "cut.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut\.npy is no plain \.npy array"):
        evaluated_tokens(settings(f"evaluate.sources=['tokens:{tmp_path / 'cut.npy'}']"))
    assert (
        evaluated_tokens(settings(f"evaluate.sources=[{source},wikitext2]", "evaluate.max_sequences=2")) == 700 + 4096
    )


def test_a_mixture_of_experts_is_planned_by_all_its_weights_and_the_work_of_those_a_token_meets(capsys):
    place = ROOT / "configs" / "shapes" / "qwen3-30b-a3b"
    shape = Shape.of(AutoConfig.from_pretrained(place))
    assert model_bytes(shape) == pytest.approx(2 * 30.53e9, rel=0.001)
    active = 2 * 2 * 151936 * 2048 + forward_flop(shape, 1)  # of the embedding too, as the model's name counts
    assert active / 2 == pytest.approx(3.35e9, rel=0.01)
    assert main(["plan", f"model.path={place}", "--gpus", "2", "--gpu", "h200", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"]
    shared = settings("quantize.n_sequences=64", "quantize.parallel=ranks")
    for name, alone, by_two, peak in (("qwen3-30b-a3b", 1.34, 1.47, 9.5), ("qwen3-235b-a22b", 3.25, 2.96, 28.8)):
        of_shape = Shape.of(AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / name))
        assert sum(gptq_layer_seconds(of_shape, 64 * 2048, 2048, 1.0).values()) == pytest.approx(alone, rel=0.15)
        said = quantize(shared, of_shape, machine("h200", 2, 500)).notes[0]
        assert float(said.split()[0]) == pytest.approx(by_two, rel=0.15)
        assert gptq_bytes(of_shape, 64 * 2048) / GIB == pytest.approx(peak, rel=0.15)
        assert all(f"{figure} s" in MODELS_PAGE for figure in (alone, by_two))
    dense = dataclasses.replace(shape, experts_per_token=128)
    seconds = [gptq_layer_seconds(s, 128 * 2048, 2048, 1.0) for s in (shape, dense)]
    assert seconds[0]["solve"] == seconds[1]["solve"]
    assert seconds[0]["hessian"] < seconds[1]["hessian"] / 3


def test_dense_layers_before_those_with_experts_are_planned_as_what_they_are(tmp_path, capsys):
    air = Glm4MoeConfig(head_dim=128)  # GLM-4.5-Air: 106 billion weights with the layer for predicting several tokens
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(air, dtype=torch.bfloat16)
    stored = sum(parameter.numel() for parameter in model.parameters())
    shape = Shape.of(air)
    assert model_bytes(shape) == pytest.approx(2 * stored, rel=1e-5)  # of norms there are few
    alike = dataclasses.replace(shape, dense=0, dense_width=0)
    assert model_bytes(alike) > 1.015 * model_bytes(shape)
    met, all_met = (gptq_layer_seconds(one, 128 * 2048, 2048, 1.0) for one in (shape, alike))
    assert all(met[part] < all_met[part] for part in ("merge", "solve", "experts"))
    assert gptq_bytes(shape, 128 * 2048) > gptq_bytes(alike, 128 * 2048)
    air.save_pretrained(tmp_path)
    words = ["plan", f"model.path={tmp_path}", "--gpus", "8", "--gpu", "h200"]
    assert main(words) == 2
    assert "set rotation.r4_block=64, or rotation.online=false" in capsys.readouterr().err
    assert main([*words, "rotation.r4_block=64"]) == 0
    assert f"46 layers, {2 * stored / 1e9:.0f} GB in 16 bits" in capsys.readouterr().out
