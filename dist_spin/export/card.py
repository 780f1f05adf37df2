"""The README.md of an export: what it is, how it was made, how good it is, and what whoever loads it must do."""

import re
from pathlib import Path
from typing import Any

from dist_spin.config.quant import QuantConfig
from dist_spin.export.export_job import FORMAT_SETTINGS, ExportJob
from dist_spin.pipeline.dtype import dtype_name
from dist_spin.pipeline.export_limits import QUANTISED
from dist_spin.pipeline.quant_sites import while_learning
from dist_spin.storage.results import bits_label, measured_fidelity
from dist_spin.version import __version__

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OF = {True: "this model", False: "another model of the run"}
MERGED = {True: "R1 and R2 are part", False: "R2 is part"}  # by rotation.r1
LOAD_EXAMPLE = """    import dist_spin

    model = dist_spin.load("PATH OF THIS DIRECTORY", device="cuda")"""


def model_card(job: ExportJob, loading: list[str]) -> str:
    """Markdown with the metadata block of the hub.

    Args:
        loading: the format's own lines on how to load the export.
    """
    config, target = job.config, job.target
    base = _base(job)
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if HUB_ID.fullmatch(base) else []),  # the hub makes a link of it
        "tags: [quantization, rotation, spinquant]",
        "---",
        f"# {config.name}: {base}, rotated" + (" and quantised" if target in QUANTISED else ""),
        "",
        f"Made by dist_spin {__version__} (`dist-spin export --format {target} export.profile={config.export.profile}`).",
        "",
        "## Loading",
        "",
        *loading,
        "",
        "## Method",
        "",
        *_method(job),
        "",
        "## Perplexity",
        "",
        *_perplexity(job),
        *_greedy(job),
        "",
    ]
    return "\n".join(lines)


def _base(job: ExportJob) -> str:
    """The model's id on the hub where that is known; else the last part of its path, without directories of the author's.

    A model that was downloaded says its id by its place in the hub's cache, or in its config.
    """
    path = job.config.model.path
    if not path.startswith(("/", ".", "~")) and not Path(path).exists():
        return path
    cached = re.search(r"models--([^/]+?)--([^/]+)", str(Path(path).expanduser().absolute()))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    named = str(getattr(job.files.config, "name_or_path", ""))
    return named if HUB_ID.fullmatch(named) and not Path(named).exists() else Path(path).resolve().name


def _method(job: ExportJob) -> list[str]:
    config, target, r4, step = job.config, job.target, bool(job.sites.r4), job.steps_learned
    q, learned, seen = config.quant, config.optimize, while_learning(config).quant
    rotated = "R1 (residual stream), " if config.rotation.r1 else ""
    rotated += "R2 (values)" + (", R4 (down_proj input, online)" if r4 else "")
    rotated += job.variant.blocks.label if config.rotation.r1 else ""
    left_out = config.rotation.online and not r4
    table = {
        "Base model": _base(job),
        "Rotations merged": rotated + ("; learned beside R3 and R4, which are left out" if left_out else ""),
        "Learned": f"{step} steps of {learned.optimizer}, {learned.batch_size} x {learned.seq_len} tokens of {learned.source}"
        if step != "0"
        else "not by this run: rotations of a file, or random ones",
        "Learned for": _online_bits(seen),
        "Number format": dtype_name(config),
    }
    if target != "gguf":
        by = " (by `dist_spin.load` alone)" if target == "hf" else ""
        table["Quantised at run time"] = f"{_online_bits(q)}{by}"
    if job.weights.scales:
        table["Learned scales"] = "merged: before linears in the norms' gains, the others in the weights"
    if job.sites.clips is not None and target != "gguf":
        table["Learned clips"] = "in the quantisers that `dist_spin.load` puts back"
    if target in QUANTISED:
        group = f"groups of {q.w_group_size}" if q.w_group_size else "one scale per output channel"
        kind = "symmetric" if q.w_symmetric else "asymmetric"
        down = f", down_proj {q.down_bits}" if q.down_bits else ""
        calibrated = f" on {config.quantize.n_sequences} x {config.quantize.seq_len} tokens of {config.quantize.source}"
        whole = q.w_format == "int"
        table["Weights"] = f"{q.w_bits} bits{down}, {kind}, {group}" if whole else f"{q.w_bits} bits, {q.w_format}"
        table["Quantised by"] = config.quantize.method + (calibrated if config.quantize.method == "gptq" else "")
    else:
        table["Weights"] = "16 bits or wider, not quantised"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items())]


def _bits(row: dict[str, Any]) -> str:
    if any(name in row for name in FORMAT_SETTINGS):
        return bits_label(row)
    return f"W{row['w_bits']}A{row['a_bits']}K{row['k_bits']}V{row['v_bits']}"


def _online_bits(q: QuantConfig) -> str:
    def width(bits: int, name: str) -> str:
        return f"{bits} ({name})" if bits < 16 and name != "int" else str(bits)

    keys, values = width(q.k_bits, q.kv_format), width(q.v_bits, q.kv_format)
    return f"activations {width(q.a_bits, q.a_format)} bits, keys {keys}, values {values}"


def _perplexity(job: ExportJob) -> list[str]:
    results = job.results
    if not results:
        return ["Not measured (`dist-spin evaluate` does)."]
    mine = [job.measured_here(row) for row in results]
    fidelity = measured_fidelity(results)
    rows = []
    for r, here in zip(results, mine, strict=True):
        cells = [r["dataset"], _bits(r), r["method"], r["weights"]]
        cells += [f"{r['ppl']:.3f}", *(f.text(r[f.name]) if f.name in r else "–" for f in fidelity), OF[here]]
        rows.append(f"| {' | '.join(cells)} |")
    said = (
        "Rows of this model are what `dist_spin.load` computes of these files, all quantisers included; a runtime that rounds "
        "otherwise, or not at all, is another measurement."
        if any(mine)
        else "None of these rows is of this model: they are of the run that it was made from."
    )
    names = ["Text", "Bits", "Method", "Weights", "Perplexity", *(figure.head for figure in fidelity), "Of"]
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    meaning = ["", "".join(f"{figure.head}: {figure.title}. " for figure in fidelity).strip()] if fidelity else []
    return [f"Measured by the run {job.config.name}. {said}", "", *head, *rows, *meaning]


def _greedy(job: ExportJob) -> list[str]:
    """How the run's models continued prompts, [] where that was not measured."""
    if not job.greedy:
        return []
    head = ["Prompts", "Bits", "Method", "Weights", "Tokens before the first other one", "Equal, %", "Of"]
    rows = []
    for r in job.greedy:
        figures = f"{r['greedy_first']:.1f} of {r['prompt_tokens']}", f"{100 * r['greedy_equal']:.1f}"
        named = f"{r['n']} of {r['prompts']}", _bits(r), r["method"], r["weights"]
        rows.append(f"| {' | '.join((*named, *figures, OF[job.measured_here(r)]))} |")
    what = (
        "Greedy continuations beside those of full precision, means over prompts; equal: positions with the same token."
    )
    return ["", what, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
