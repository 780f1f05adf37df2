"""Compare what a serving engine computes of an export with what `dist_spin.load` computes of it.

    dist-spin serve-check runs/NAME/export/compressed-tensors --python .vllm/bin/python

How far the two may be apart is derived in docs/serving.md.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_spin.data import load_tokens
from dist_spin.errors import NotServed, UserError
from dist_spin.export.serving import linear_backend
from dist_spin.export.sidecar import Sidecar, read_sidecar
from dist_spin.model.weights import read_tokenizer
from dist_spin.runtime.cpu_features import INT8_SATURATES, int8_is_exact
from dist_spin.serve.engine import Answer, Question, ask, find_python
from dist_spin.serve.oracle import Expected, expected, served_sites

PERPLEXITY = 0.005  # of the oracle's perplexity, beside two standard errors of the mean difference
# Root mean square of the differences of log-probabilities. Sums taken in another order, in nats, by the number format:
SUMMED = {"float32": 0.001, "bfloat16": 0.1, "float16": 0.02}
ROUNDED = (
    2.0  # beside that, in units of what rounding activations changes at all: sqrt 2 where all errors are drawn anew
)
ROUNDED_BY_KERNEL = ("CompressedTensorsWNA8Int", "CompressedTensorsWNA4Int")  # vLLM's schemes that leave rounding to it


@dataclass(frozen=True)
class Comparison:
    """How far an engine is from the oracle on one export.

    Args:
        perplexity, expected_perplexity: of the text, the engine's and the oracle's.
        difference: root mean square of the differences of log-probabilities, nats. allowed: the largest that passes.
        rounding: that of `dist_spin.load` with and without rounding of activations, 0 where they are not rounded.
        tokens: written greedily. same: how many of them the oracle would have written in their place.
        regret: the most that a token of the engine's is less probable to the oracle than its own choice, nats.
        kernels: what multiplies. problem: why it does not pass; empty where it does.
    """

    export: str
    engine: str
    kernels: list[str]
    perplexity: float = math.nan
    expected_perplexity: float = math.nan
    difference: float = math.nan
    allowed: float = math.nan
    rounding: float = 0.0
    tokens: int = 0
    same: int = 0
    regret: float = math.nan
    problem: str = ""


def serve_check(
    paths: list[Path],
    *,
    python: Path | None = None,
    text: str = "pydoc",
    sequences: int = 8,
    seq_len: int = 128,
    tokens: int = 16,
    tensor_parallel: int = 1,
    kv_cache_dtype: str = "auto",
    emulate: bool = False,
    as_json: bool = False,
    shown: bool = False,
) -> None:
    """Load each export in vLLM, ask it, and print whether it computes what `dist_spin.load` does.

    Args:
        python: the interpreter of the engine's environment; None: see `find_python`.
        text: a source as of evaluate.sources, its test part, of which `sequences` windows of `seq_len` tokens are read.
        tokens: how many are written greedily after the first half of each window.
        tensor_parallel, kv_cache_dtype: as vLLM's options. as_json: print a list of `Comparison`s.
        emulate: on a CPU, where vLLM has no kernel for NVFP4, let it use its emulation.
        shown: let the engine print what it does.

    Raises:
        NotServed: an export does not pass; all are tried.
        UserError: no engine or no such export or text.
    """
    if seq_len < 4 or min(sequences, tokens, tensor_parallel) < 1:
        raise UserError("serve-check reads windows of 4 tokens or more", "give counts above 0, and --seq-len 4 or more")
    interpreter = find_python(python)
    sidecars = [read_sidecar(path) for path in paths]
    windows = [_windows(path, text, sequences, seq_len) for path in paths]
    questions = [
        Question(path, sidecar.dtype, ids.tolist(), _backend(path))
        for path, sidecar, ids in zip(paths, sidecars, windows, strict=True)
    ]
    engine, answers = ask(
        interpreter,
        questions,
        new_tokens=tokens,
        tensor_parallel=tensor_parallel,
        kv_cache_dtype=kv_cache_dtype,
        emulate=emulate,
        shown=shown,
    )
    found = []
    for path, sidecar, ids, answer in zip(paths, sidecars, windows, answers, strict=True):
        if answer.error:
            found.append(Comparison(str(path), engine, [], problem=f"does not load: {answer.error}"))
        else:
            sites = served_sites(sidecar, kv_cache_dtype)
            ours = expected(path, sidecar, sites, ids, torch.tensor(answer.greedy))
            found.append(compare(str(path), engine, sidecar, answer, ours))
        if not as_json:
            print(described(found[-1]))
    if as_json:
        print(json.dumps([asdict(comparison) for comparison in found], indent=2))
    failed = [comparison for comparison in found if comparison.problem]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise NotServed(
            f"{failed[0].export}{more}: {failed[0].problem}", "docs/serving.md says what each engine computes"
        )


def _windows(path: Path, text: str, sequences: int, seq_len: int) -> Tensor:
    """Windows of the text, [sequences, seq_len], in tokens of the export's own tokenizer."""
    tokenizer = None if text.startswith("tokens:") else read_tokenizer(path)
    windows = load_tokens(text, "test", seq_len, tokenizer)
    if len(windows) < sequences:
        raise UserError(f"{text} has {len(windows)} windows of {seq_len} tokens", f"give --sequences {len(windows)}")
    return windows[:sequences]


def _backend(path: Path) -> str:
    """vLLM's --linear-backend for the export; the sidecar was read, so that config.json is there."""
    return linear_backend(json.loads((path / "config.json").read_text()).get("quantization_config", {}))


def compare(export: str, engine: str, sidecar: Sidecar, answer: Answer, ours: Expected) -> Comparison:
    """The engine's answer beside the oracle's."""
    theirs = torch.tensor(answer.window_logprobs)
    difference = _rms(theirs - ours.windows)
    rounding = 0.0 if ours.unrounded is None else _rms(ours.windows - ours.unrounded)
    allowed = SUMMED[sidecar.dtype] + ROUNDED * rounding
    near = PERPLEXITY + 2 * difference / math.sqrt(theirs.numel())
    perplexity, wanted = (float(part.mean().neg().exp()) for part in (theirs, ours.windows))
    regret = float((ours.best - ours.written).max())
    problems = [
        _unrounded(answer.kernels),
        not torch.isfinite(theirs).all() and "the engine's log-probabilities are not finite",
        not abs(perplexity / wanted - 1) <= near and f"perplexity {perplexity:.4g} instead of {wanted:.4g}",
        not difference <= allowed
        and f"log-probabilities differ by {difference:.2g} (rms), {allowed:.2g} are explained",
        # A choice between two tokens turns where their difference does: each may be off by the tail of `allowed`.
        not regret <= 8 * allowed and f"it writes a token that is less probable by {regret:.2g} nats",
    ]
    if any(problems) and any("CPUInt8" in kernel for kernel in answer.kernels) and not int8_is_exact():
        problems.append(INT8_SATURATES)
    return Comparison(
        export,
        engine,
        answer.kernels,
        perplexity,
        wanted,
        difference,
        allowed,
        rounding,
        tokens=ours.written.numel(),
        same=int((ours.best == ours.written).sum()),
        regret=regret,
        problem="; ".join(problem for problem in problems if problem),
    )


def _unrounded(kernels: list[str]) -> str:
    """The problem that a kernel of weights alone computes a linear whose input is to be rounded; empty where it is none."""
    found = [k for k in kernels if k.partition(": ")[2].startswith(ROUNDED_BY_KERNEL) and "Humming" not in k]
    return f"activations stay in 16 bits here, since the kernel takes no others ({found[0]})" if found else ""


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def described(c: Comparison) -> str:
    """What is printed of a comparison."""
    lines = [f"{'FAIL' if c.problem else 'pass'}  {c.export}  {c.engine}"]
    lines += [f"      {kernel}" for kernel in c.kernels if "Unquantized" not in kernel]
    if not math.isnan(c.perplexity):
        lines += [
            f"      perplexity {c.perplexity:.4f}, dist_spin.load {c.expected_perplexity:.4f}",
            f"      log-probabilities differ by {c.difference:.2g} nats (rms), {c.allowed:.2g} are explained",
            f"      {c.same} of {c.tokens} greedy tokens are the same, the others at most {c.regret:.2g} nats less probable",
        ]
    return "\n".join([*lines, *([f"      {c.problem}"] if c.problem else [])])
