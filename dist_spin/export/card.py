"""The README.md of an export: what it is, how it was made, how good it is, and what whoever loads it must do."""

from pathlib import Path
from typing import Any

from dist_spin.config.run import RunConfig
from dist_spin.export.compressed import REFUSAL
from dist_spin.pipeline.export_limits import QUANTISED
from dist_spin.version import __version__

RIGHT = """    import dist_spin

    model = dist_spin.load("PATH OF THIS DIRECTORY", device="cuda")"""


def model_card(
    config: RunConfig,
    target: str,
    *,
    r4: bool,
    quantisers: bool,
    scales: bool,
    clips: bool,
    step: str,
    results: list[dict[str, Any]],
) -> str:
    """Markdown with the metadata block of the hub.

    Args:
        r4: the input of down_proj must be rotated online. quantisers: activations, keys or values are to be quantised.
        scales: learned ones are part of the weights. clips: learned ones are put back with the quantisers.
        step: how many steps the rotations were learned for. results: rows of results.json.
    """
    base = _base(config)
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {base}",
        "tags: [quantization, rotation, spinquant]",
        "---",
        f"# {config.name}: {base}, rotated" + (" and quantised" if target in QUANTISED else ""),
        "",
        f"Made by dist_spin {__version__} (`dist-spin export --format {target} export.profile={config.export.profile}`).",
        "",
        "## Loading",
        "",
        *_loading(config, target, r4, quantisers, scales),
        "",
        "## Method",
        "",
        *_method(config, target, r4, scales, clips, step),
        "",
        "## Perplexity",
        "",
        *_perplexity(results),
        "",
    ]
    return "\n".join(lines)


def _base(config: RunConfig) -> str:
    """The hub's name of the model, or the last part of a path: where it lay is nobody's business."""
    path = config.model.path
    return Path(path).name if path.startswith(("/", ".", "~")) else path


def _loading(config: RunConfig, target: str, r4: bool, quantisers: bool, scales: bool) -> list[str]:
    if target == "gguf":
        gains = "norm gains are learned scales" if scales else "norm gains are ones"
        return [
            f"Any llama.cpp runtime: R1 and R2 are part of the weights, {gains}, nothing has to be done online.",
            "Quantising the file rounds it anew; measure the result before you believe it.",
        ]
    if target == "executorch":
        return _executorch_loading(r4)
    if r4 and target == "hf":
        return [
            "**Only `dist_spin.load` loads this model.** Its down_proj weights expect an input that is rotated online by the",
            "Hadamard R4. A bare `from_pretrained` would be wrong without a word, so config.json carries a model type that",
            "other programs refuse, and down_proj has a name of its own, with nothing under the usual one.",
            "",
            RIGHT,
        ]
    if r4:
        return [
            "**A bare transformers `from_pretrained` stops with an error**, on purpose: it would leave out the Hadamard R4 in",
            f"front of down_proj, which the weights need (`global_compression_ratio` of config.json says `{REFUSAL}`",
            "instead of a number). Right are",
            "",
            RIGHT,
            "",
            "and runtimes that apply `transform_config` of config.json online (vLLM with tensor-parallel size 1; it refuses",
            "more).",
            *_serving(config),
        ]
    plain = ["Any program that loads the format: R1 and R2 are part of the weights, nothing has to be rotated online."]
    if target == "compressed-tensors":
        return [*plain, *_serving(config), "", RIGHT, "", "gives what was measured below, quantisers included."]
    if quantisers:
        plain += ["Quantisers of activations, keys and values, as they were learned with, are put back by", "", RIGHT]
    return plain


def _executorch_loading(r4: bool) -> list[str]:
    lines = [
        "ExecuTorch's pre-quantised Llama loader (`executorch.examples.models.llama`), with `consolidated.00.pth` as",
        "`base.checkpoint`, `params.json` as `base.params` and the entries under `llm_config` in `dist_spin.json`.",
        "lm_head's input is quantised there too, where lm_head has 8 bits; the perplexity below is without that.",
    ]
    if r4:
        lines += [
            "",
            "**Not without `use_spin_quant: native`**: the weights of `feed_forward.w2` expect an input that is rotated online",
            "by the Hadamard R4. The loader itself does not put it there: the exporter does (`export_llama`), or",
            "`inject_fast_hadamard_transform_native_for_spin_quant(model)`.",
        ]
    return lines


def _serving(config: RunConfig) -> list[str]:
    lines = []
    if config.quant.arithmetic == "compressed-tensors" and config.export.profile == "no-had":
        lines.append("Bare transformers rounds what the linears read and hold as measured below, to the bit.")
    if config.quant.arithmetic == "fp32" and config.model.dtype in ("bfloat16", "float16"):
        lines.append("Scales are in fp32 here; a program that holds them in 16 bits rounds them, by up to 0.2 %.")
    if config.quant.a_bits < 16:
        here = "127.5 (7.5)" if config.quant.arithmetic == "compressed-tensors" else "127 (7)"
        lines += [
            f"How activations are rounded is the runtime's own: here the largest is divided by {here}. Transformers divides by",
            "127.5 (7.5), others by 127 (7); `quant.arithmetic=compressed-tensors` learns, quantises and measures as the former.",
        ]
    if min(config.quant.k_bits, config.quant.v_bits) < 16:
        lines.append("The KV cache is quantised by `dist_spin.load` alone; elsewhere it is a matter of how one serves.")
    return lines


def _method(config: RunConfig, target: str, r4: bool, scales: bool, clips: bool, step: str) -> list[str]:
    q, learned = config.quant, config.optimize
    rotated = "R1 (residual stream), R2 (values)" + (", R4 (down_proj input, online)" if r4 else "")
    left_out = config.rotation.online and not r4
    table = {
        "Base model": _base(config),
        "Rotations merged": rotated + ("; learned beside R3 and R4, which are left out" if left_out else ""),
        "Learned": f"{step} steps of {learned.optimizer}, {learned.batch_size} x {learned.seq_len} tokens of {learned.source}"
        if step != "0"
        else "not by this run: rotations of a file, or random ones",
        "Learned for": f"activations {q.a_bits} bits, keys {q.k_bits}, values {q.v_bits}",
        "Number format": config.model.dtype,
    }
    if scales:
        table["Learned scales"] = "merged: before linears in the norms' gains, the others in the weights"
    if clips:
        table["Learned clips"] = "in the quantisers that `dist_spin.load` puts back"
    if target in QUANTISED:
        group = f"groups of {q.w_group_size}" if q.w_group_size else "one scale per output channel"
        kind = "symmetric" if q.w_symmetric else "asymmetric"
        down = f", down_proj {q.down_bits}" if q.down_bits else ""
        calibrated = f" on {config.quantize.n_sequences} x {config.quantize.seq_len} tokens of {config.quantize.source}"
        table["Weights"] = f"{q.w_bits} bits{down}, {kind}, {group}"
        table["Quantised by"] = config.quantize.method + (calibrated if config.quantize.method == "gptq" else "")
    else:
        table["Weights"] = "16 bits or wider, not quantised"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items())]


def _perplexity(results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return ["Not measured (`dist-spin evaluate` does)."]
    rows = [
        f"| {r['dataset']} | W{r['w_bits']}A{r['a_bits']}K{r['k_bits']}V{r['v_bits']} | {r['method']} | {r['weights']} "
        f"| {r['ppl']:.3f} |"
        for r in results
    ]
    return ["| Text | Bits | Method | Weights | Perplexity |", "|---|---|---|---|---|", *rows]
