"""The `executorch` export: what the file holds, what ExecuTorch's own loader and runtime make of it, what is refused."""

import json
from pathlib import Path

import executorch_runtime
import pytest
import tiny
import torch
import yaml
from exported import IDS, exported, pipeline_cell, settings
from transformers import LlamaConfig

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.export.executorch import META_NAMES, interleaved
from dist_spin.model import rotate_quantize
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.export_limits import check_target, model_params
from dist_spin.storage.quantized_layers import layer_path, load_embeddings, load_layer
from dist_spin.storage.run_directory import RunDir

RECIPE = "configs/recipes/llama-3.2-1b-executorch.yaml"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
POWER = LlamaConfig(**{**tiny.COMMON, **SIZES, "tie_word_embeddings": True})
PLAIN_ENDS = ["quant.embedding_bits=16", "quant.head_bits=16"]
NO_HAD = ["rotation.online=false", "export.profile=no-had"]

pytestmark = [
    pytest.mark.usefixtures("restored_process"),
    pytest.mark.filterwarnings("ignore"),  # executorch's and torchao's own
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The recipe's settings on a tiny model whose sizes are powers of two, its run made."""
    place = tmp_path_factory.mktemp("executorch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SHAPES, "power", POWER)
        words = [*recipe(), *settings(place, "power"), "name=run"]
    make_stages(words)
    return words


def recipe() -> list[str]:
    """The settings of the recipe's file, to be overridden."""
    groups = yaml.safe_load(Path(RECIPE).read_text())
    return [
        f"{group}.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for group, entries in groups.items()
        if isinstance(entries, dict)
        for name, value in entries.items()
    ]


def make_stages(words: list[str]) -> None:
    for stage in ("optimize", "quantize"):
        assert main([stage, *words]) == 0


@pytest.fixture(scope="module")
def export(words) -> Path:
    return exported(words, "executorch")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_file_holds_the_codes_and_scales_of_the_run(words, export):
    run = RunDir(export.parent.parent)
    held = torch.load(export / "consolidated.00.pth", weights_only=True)
    assert not list(export.glob("*.mapped"))
    seen = set()
    for index in range(2):
        layer, _ = load_layer(layer_path(run.layers(), index))
        for role, name in META_NAMES.items():
            for kind, wanted in (
                ("weight", layer.quantized_weights[role].codes),
                ("scales", layer.quantized_weights[role].scale),
            ):
                found = held[f"layers.{index}.{name}.{kind}"]
                seen.add(f"layers.{index}.{name}.{kind}")
                if role in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs 0 1, 2 3, … back to halves
                    found = torch.cat([half for head in found.split(16) for half in (head[0::2], head[1::2])])
                assert torch.equal(found, wanted)
                assert found.dtype == (torch.int8 if kind == "weight" else torch.float32)
        for norm in ("attention_norm", "ffn_norm"):
            assert torch.equal(held[f"layers.{index}.{norm}.weight"], torch.ones(64))
            seen.add(f"layers.{index}.{norm}.weight")
    ends, _ = load_embeddings(run.layers() / "ends.safetensors")
    for end, name in (("embedding", "tok_embeddings"), ("head", "output")):
        assert torch.equal(held[f"{name}.weight"], ends[end].codes)
        assert torch.equal(held[f"{name}.scales"], ends[end].scale)
    assert held.keys() == seen | {
        "norm.weight",
        *(f"{n}.{k}" for n in ("tok_embeddings", "output") for k in ("weight", "scales")),
    }


def torchaos_rounding(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """8 bits per token as torchao computes them: ours divides by the scale, which moves a code here and there."""
    if not spec.enabled:
        return x
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x * (1 / scale)) + zero, 0, 255) - zero) * scale


def test_executorch_loads_it_and_computes_what_we_compute(words, export, monkeypatch):
    theirs, ours = executorch_runtime.load(export), pipeline_cell(words, "gptq")
    with torch.no_grad():
        found = [theirs(ids) for ids in IDS[:, None]]
        assert distance(torch.cat(found), ours(IDS).logits) < 0.05
        monkeypatch.setattr(rotate_quantize, "fake_quantize", torchaos_rounding)
        # ExecuTorch quantises the input of an 8-bit lm_head as well.
        hidden = torchaos_rounding(ours.model(IDS).last_hidden_state, QuantSpec(8))
        wanted = hidden @ ours.lm_head.weight.T
        assert distance(torch.cat(found), wanted) < 1e-5
        without = executorch_runtime.load(export, inject_r4=False)
        assert distance(without(IDS[:1]), wanted[:1]) > 0.3


def test_without_hadamard_and_with_plain_ends(words, monkeypatch):
    words = [*words, *NO_HAD, *PLAIN_ENDS, "name=plain"]
    make_stages(words)
    place = exported(words, "executorch")
    model, ours = executorch_runtime.load(place), pipeline_cell(words, "gptq")
    monkeypatch.setattr(rotate_quantize, "fake_quantize", torchaos_rounding)
    with torch.no_grad():
        assert distance(model(IDS[:1]), ours(IDS[:1]).logits) < 1e-5
    assert "use_spin_quant" not in (place / "README.md").read_text()


def test_learned_scales_are_in_the_weights_and_norms(words, monkeypatch):
    words = [*words, *PLAIN_ENDS, "optimize.scales=true", "optimize.scale_lr=0.3", "name=scales"]
    make_stages(words)
    place = exported(words, "executorch")
    held = torch.load(place / "consolidated.00.pth", weights_only=True)
    for name, gain in held.items():
        if "_norm" in name:
            assert (gain - 1).abs().max() > 0.05
    model, ours = executorch_runtime.load(place), pipeline_cell(words, "gptq")
    monkeypatch.setattr(rotate_quantize, "fake_quantize", torchaos_rounding)
    with torch.no_grad():
        found, wanted = model(IDS[:1]), ours(IDS[:1]).logits
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)  # of each token
    # A gain's last bit moves a code of a token here and there; without the gains every token is far off.
    assert off.median() < 1e-5
    assert off.max() < 1e-2


def test_a_run_with_r4_says_what_it_needs(export):
    about = json.loads((export / "dist_spin.json").read_text())
    assert about["llm_config"]["quantization"] == {"use_spin_quant": "native"}
    assert "Not without `use_spin_quant: native`" in (export / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)  # lowering takes its time on a busy machine
def test_a_program_runs_on_executorchs_cpu_runtime(export):
    model, ids = executorch_runtime.load(export), IDS[:1, :8]
    with torch.no_grad():
        wanted = model(ids)
    pte = executorch_runtime.program(model, ids)
    found = executorch_runtime.run(pte, ids)
    # XNNPACK keeps weight scales in bfloat16, and a code of an activation here and there falls to the other side.
    assert distance(found, wanted) < 0.1
    other = executorch_runtime.run(pte, ids.flip(1))
    assert distance(other, wanted) > 0.3


def test_scaled_position_embeddings_are_theirs():
    from executorch.examples.models.llama.model_args import ModelArgs
    from executorch.examples.models.llama.rope import Rope
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(**{**tiny.COMMON, **SIZES, "head_dim": 64}, rope_parameters=rope)
    theirs = Rope(ModelArgs(**model_params(config, 32), max_context_len=64))
    angles = torch.arange(64)[:, None] * LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(theirs.freqs_cos[:64], angles.cos(), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="position embedding"):
        model_params(LlamaConfig(**tiny.COMMON, rope_parameters=rope | {"low_freq_factor": 2.0}), 32)


def test_reordering_pairs_the_halves_of_every_head():
    rows = torch.arange(8)[:, None]  # two heads of four: halves 0 1 | 2 3 and 4 5 | 6 7
    assert interleaved(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("model", "more", "what"),
    [
        (POWER, ["quant.a_bits=4"], "quant.a_bits=4"),
        (POWER, ["quant.a_symmetric=true"], "quant.a_symmetric=True"),
        (POWER, ["optimize.clips=true"], "learned clips have no place in executorch"),
        (POWER, ["quant.o_per_head=true"], "quant.o_per_head=True"),
        (POWER, ["quant.k_bits=4"], "quant.k_bits=4"),
        (POWER, ["quant.w_group_size=0"], "quant.w_group_size=0"),
        (POWER, ["quant.w_group_size=128"], "does not cut the hidden size 64"),
        (POWER, ["quant.w_group_size=64"], "does not cut the hidden size 64"),
        (POWER, ["quant.down_bits=8"], "quant.down_bits=8"),
        (POWER, ["quant.head_bits=4"], "quant.head_bits=4"),
        (POWER, ["quantize.method=none"], "weights of 4 bits"),
        (POWER, ["rotation.r4_block=64"], "rotation.r4_block=64"),
        (POWER, ["export.profile=no-had"], "rotation.online=true"),
        (LlamaConfig(**{**tiny.COMMON, **SIZES, "intermediate_size": 96}), [], "power of two, not 96"),
        (LlamaConfig(**{**tiny.COMMON, **SIZES}, attention_bias=True), [], "biases"),
        (tiny.SHAPES["qwen2"], [], "architecture 'qwen2'"),
        (tiny.SHAPES["mistral_window"], [], "a sliding window"),
    ],
)
def test_what_executorch_has_no_place_for_is_refused_at_the_start(model, more, what):
    check_target("executorch", load_config(RECIPE, []), POWER, starting=True)
    with pytest.raises(UserError) as caught:
        check_target("executorch", load_config(RECIPE, more), model, starting=True)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_without_r4_need_no_power_of_two():
    model = LlamaConfig(**{**tiny.COMMON, **SIZES, "intermediate_size": 96})
    check_target("executorch", load_config(RECIPE, NO_HAD), model, starting=True)
