"""What `dist-spin status` prints for a person: a line for each thing that a run has, does or waits for."""

import time
from pathlib import Path
from typing import Any

from dist_spin.report.holders import ALIVE, ELSEWHERE, ENDED
from dist_spin.report.jobs import FINISHED
from dist_spin.report.sequence_lengths import too_long
from dist_spin.runtime.progress import clock


def status_text(figures: dict[str, Any]) -> str:
    """The figures of `status.status` in lines."""
    if "optimize" not in figures:
        return "\n".join([f"run       {figures['run']}, not begun", *_now(figures)])
    lines = [f"run       {figures['run']}", _learning(figures)]
    for name, states in figures["quantize"].items():
        others = [f"{state} {ranges(layers)}" for state, layers in states.items() if layers and state != "finished"]
        lines.append("; ".join([f"quantize  {name}: {len(states['finished'])} layers finished", *others]))
    measured = [r for r in figures["results"] if r.get("stage") != "compare"]
    for r in measured:
        lines.append(f"result    {r['method']}, {r['weights']} weights: {_figure(r)}")
    if planned := figures["planned_rows"]:
        lines.append(f"compare   {len(figures['results']) - len(measured)} of {planned} rows in results.json")
    lines += [f"export    {e['format']}, {e['profile']}: {e['path']}" for e in figures["exports"]]
    if figures["report"]:
        lines.append(f"report    {Path(figures['run']) / 'report.html'}")
    return "\n".join([*lines, *_lengths(figures["sequence_lengths"]), *_now(figures)])


def _figure(row: dict[str, Any]) -> str:
    """What was measured, in words."""
    if "ppl" in row:
        return f"{row['ppl']:.3f} on {row['dataset']}"
    if "prompts" in row:
        first = f"{row['greedy_first']:.1f} of {row['prompt_tokens']}"
        return f"{first} tokens as full precision on {row['prompts']}"
    return f"{row['metric']} {row['value']:.4f} on {row['task']}"


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _learning(figures: dict[str, Any]) -> str:
    o = figures["optimize"]
    at_work = any(is_at_work(h) and {"optimize", "run"} & set(h["what"]) for h in figures["holders"])
    loss = "" if o["loss"] is None else f", loss {o['loss']:.4f}"
    if o["complete"]:
        left = "complete"
    elif o["seconds_left"] is not None:
        left = f"about {clock(o['seconds_left'])} left" + ("" if at_work else " once it continues")
    elif o["steps"] == 0:
        left = "nothing is to be learned"
    else:
        left = "the time left is known after the first step" if at_work else "not begun"
    return f"optimize  step {o['step']} of {o['steps']}{loss}, {left}"


def _lengths(lengths: dict[str, int | None]) -> list[str]:
    """Sequence lengths beside the model's context, and a line for each that is too long."""
    by_stage = ", ".join(f"{stage} {tokens}" for stage, tokens in lengths.items() if stage != "context")
    if not by_stage:
        return []
    context = f"; the model takes {lengths['context']}" if lengths["context"] else ""
    return [f"lengths   {by_stage} tokens a sequence{context}", *(f"warning   {text}" for text in too_long(lengths))]


def _now(figures: dict[str, Any]) -> list[str]:
    """Jobs, processes, what has stopped the run, and what happened last."""
    lines = [
        f"job       {j['job']} {j['stage']}: {j['state']}"
        + (f" ({j['reason']})" if j["reason"] not in ("", "None") else "")
        for j in _latest(figures["jobs"])
    ]
    lines += [f"held by   {_holder(holder)}" for holder in figures["holders"]]
    if stopped := figures["stopped"]:
        name = f"{stopped['stage']} {stopped['part']}".strip()
        ago = "" if stopped["time"] is None else f", {clock(time.time() - stopped['time'])} ago"
        lines.append(f"stopped   {name}{ago}: {stopped['problem']}")
    if event := figures["last_event"]:
        lines.append(f"last      {event['event']}, {clock(time.time() - event['time'])} ago")
    return lines


def _latest(jobs: list[dict[str, str]]) -> list[dict[str, str]]:
    """The jobs of each stage or part, but for those that have ended and were submitted again."""
    last = {job["stage"]: job["job"] for job in jobs}
    return [
        job for job in jobs if last[job["stage"]] == job["job"] or job["state"] not in (*FINISHED, "ENDED", "unknown")
    ]


def is_at_work(holder: dict[str, Any]) -> bool:
    """Whether this holder, one of `status`'s, may still change the run."""
    return holder["state"] in (ALIVE, ELSEWHERE)


def _holder(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    who = f"{', '.join(holder['what'])}: process {holder['pid']} on {holder['host']}{job}"
    if is_at_work(holder):
        return f"{who}, for {clock(time.time() - holder['since'])}"
    gone = "it has ended" if holder["state"] == ENDED else "no sign of it for more than a minute"
    return f"{who}; {gone}, and the next start takes the run over"
