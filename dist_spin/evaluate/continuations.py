"""Greedy continuations of prompts: how long a variant writes what the full-precision model writes.

    dist-spin evaluate CONFIG.yaml evaluate.prompts=prompts.txt

Both models decode greedily, so that every difference comes from quantisation. After the first differing token they continue
different texts; how late that token comes is therefore the figure to compare. The whole model is in memory, as for `generate`.
"""

import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_spin.config.checks import one_line
from dist_spin.config.run import RunConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.evaluate.generate import end_tokens, greedy
from dist_spin.evaluate.layerwise_model import load_full_model
from dist_spin.evaluate.measurements import load_rows, save_rows
from dist_spin.evaluate.targets import EvalTarget, describe, target_identity
from dist_spin.model.context import context_length
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.model import check_vocabulary
from dist_spin.runtime.distributed import World, any_rank, on_rank0, raise_on_any_failure, sum_over_ranks_, work_apart
from dist_spin.runtime.progress import Progress
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import identity_hash

ONE_A_LINE = "give one prompt a line, or, in a file that ends in .jsonl, a JSON string or an object with `prompt`"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines that are not blank; in a .jsonl file JSON strings or objects with `prompt`.

    Raises:
        UserError: it cannot be read or holds no prompt, or a line is no such JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"evaluate.prompts: {one_line(str(path))} cannot be read ({reason})", ONE_A_LINE) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt: Any = line
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)
            except ValueError:
                prompt = None
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"evaluate.prompts: line {number} of {one_line(str(path))} holds no prompt", ONE_A_LINE)
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"evaluate.prompts: {one_line(str(path))} is empty", ONE_A_LINE)
    return prompts


def agreement(first: list[int], second: list[int], wanted: int) -> tuple[int, float]:
    """How many leading tokens two continuations share, and the share of positions of the longer one with equal tokens.

    Continuations that are equal to their end share all of the `wanted` tokens, also where the text ended before.
    """
    if first == second:
        return wanted, 1.0
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same), sum(same) / max(len(first), len(second))


def prompt_rows(
    config: RunConfig, world: World, files: ModelFiles, run: RunDir, targets: list[EvalTarget], stop: StopRequest
) -> list[dict[str, Any]]:
    """A row for each target but full precision, which is the first: how its continuations agree with those of full precision.

    greedy_first: mean number of tokens before the first differing one, at most evaluate.prompt_tokens. greedy_equal: share of
    positions with equal tokens, mean over prompts. n: prompts. Ranks share the prompts.

    Raises:
        Interrupted: a signal came; what is measured is kept.
        UserError: the prompts cannot be read, or are too long for the model.
    """
    path = Path(config.path(config.evaluate.prompts or ""))
    ids = on_rank0(lambda: prompt_ids(config, files, path))
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    rows: list[dict[str, Any]] = []
    original: list[list[int]] | None = None
    for target in targets[1:]:
        row = {k: v for k, v in describe(config, target).items() if k != "method"}
        row |= {"prompts": path.name, "n": len(ids), "prompt_tokens": config.evaluate.prompt_tokens}
        decides = {**row, "prompts": digest, "layers": target.fingerprint, **target_identity(config, files, target)}
        identity = identity_hash(decides)
        row = {"method": target.label, **row, **({"layers": target.fingerprint} if target.fingerprint else {})}
        before = load_rows(run, identity)
        if before is None:
            began = time.monotonic()
            if original is None:
                original = continuations(config, world, files, run, targets[0], ids, stop)
            mine = continuations(config, world, files, run, target, ids, stop)
            figures = torch.zeros(len(ids), 2, dtype=torch.float64)
            for number, (theirs, ours) in enumerate(zip(original, mine, strict=True)):
                found = agreement(theirs, ours, config.evaluate.prompt_tokens)
                figures[world.rank + number * world.size] = torch.tensor(found, dtype=torch.float64)
            first, equal = sum_over_ranks_(figures).mean(0).tolist()
            seconds = round(time.monotonic() - began, 2)
            before = [row | {"greedy_first": first, "greedy_equal": equal, "seconds": seconds}]
            save_rows(run, identity, before)
        rows.append(before[0] | row)
        if any_rank(bool(stop)):
            raise Interrupted("stopped by a signal between two measurements", "the same command continues")
    return rows


def prompt_ids(config: RunConfig, files: ModelFiles, path: Path) -> list[list[int]]:
    """Token ids of every prompt of a file.

    Raises:
        UserError: as `read_prompts`; or a prompt has no token, or leaves no room for its continuation in the model's context.
    """
    tokenizer, wanted, context = files.tokenizer(), config.evaluate.prompt_tokens, context_length(files.config)
    out: list[list[int]] = []
    for number, prompt in enumerate(read_prompts(path), 1):
        ids = tokenizer(prompt)["input_ids"]
        which = f"evaluate.prompts: prompt {number} of {one_line(str(path))}"
        if not ids:
            raise UserError(f"{which} has no token", ONE_A_LINE)
        if context is not None and len(ids) + wanted > context:
            problem = (
                f"{which} has {len(ids)} tokens; with {wanted} more it is longer than the model's context of {context}"
            )
            raise UserError(problem, "shorten it, or set evaluate.prompt_tokens lower")
        check_vocabulary(torch.tensor(ids), files.shape, which)
        out.append(ids)
    return out


def continuations(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    run: RunDir,
    target: EvalTarget,
    ids: list[list[int]],
    stop: StopRequest,
) -> list[list[int]]:
    """What a target writes after those of the prompts that are this rank's."""
    out: list[list[int]] = []
    what = f"continue prompts, {target.label}, {target.weights} weights: prompt"

    def write() -> None:
        model, ends = load_full_model(config, world, files, run, target), end_tokens(files)
        mine = ids[world.rank :: world.size]
        progress = Progress(what, len(mine), show=world.is_rank0)
        for prompt in mine:
            start = torch.tensor([prompt], device=world.device)
            whole: Tensor = greedy(model, start, config.evaluate.prompt_tokens, ends)
            out.append(whole[0, len(prompt) :].tolist())
            progress.advance()
            if stop:
                problem = f"stopped by a signal after {len(out)} continuations"
                raise Interrupted(problem, "the same command continues with that measurement")

    if world.size == 1:
        write()
    else:  # texts end at different places: no rank is to take a longer one elsewhere for a hang
        raise_on_any_failure(functools.partial(work_apart, write, min(10.0, config.distributed.timeout_s / 10)))
    return out
