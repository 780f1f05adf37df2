"""The engine on this machine: found, started in a process of its own, asked once.

Engines pin other versions of torch and transformers than the product does, so that they live in an environment of their own;
what is asked and answered goes through two files.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dist_spin.errors import Interrupted, NotServed, UserError
from dist_spin.runtime.progress import say
from dist_spin.runtime.signals import forwarded_to
from dist_spin.serve.vllm_worker import EMULATE

WORKER = Path(__file__).with_name("vllm_worker.py")
STDERR = 2  # the descriptor
KV_SPACE_GB = 1  # of host memory for the cache of keys and values, where the engine runs on the CPU


@dataclass(frozen=True)
class Question:
    """One export, and what it is asked. windows: token ids, each of the same length; dtype: a torch name; linear_backend:
    vLLM's option, empty to leave it the choice."""

    path: Path
    dtype: str
    windows: list[list[int]]
    linear_backend: str


@dataclass(frozen=True)
class Answer:
    """What the engine computed of one export.

    Args:
        window_logprobs: natural log-probability of every token of every window but the first, [windows][length - 1].
        greedy: the tokens that it continues the first half of each window with.
        kernels: what multiplies in each kind of linear, "name: scheme (kernel)"; empty where the engine was not asked.
        error: why it did not load or answer; empty where it did.
    """

    window_logprobs: list[list[float]] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    error: str = ""


def find_python(given: Path | None) -> Path:
    """The interpreter that has vLLM: `given`, this one, or the one beside the `vllm` program on PATH.

    Raises:
        UserError: none is there.
    """
    program = shutil.which("vllm")
    beside = [Path(program).parent / "python"] if program else []
    for python in [given] if given else [Path(sys.executable), *beside]:
        look = [str(python), "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"]
        try:
            if subprocess.run(look, check=False, capture_output=True).returncode == 0:
                return python
        except OSError as error:
            raise UserError(
                f"--python {python}: {error.strerror}", "give the interpreter of vLLM's environment"
            ) from error
    where = f"{given} has no vLLM" if given else "neither this interpreter nor PATH has vLLM"
    raise UserError(
        where, "give --python ENVIRONMENT/bin/python; `make vllm-venv` installs its build for CPUs in .vllm"
    )


def ask(
    python: Path,
    questions: list[Question],
    *,
    new_tokens: int,
    tensor_parallel: int,
    kv_cache_dtype: str,
    emulate: bool = False,
    shown: bool,
) -> tuple[str, list[Answer]]:
    """Engine and version, and its answers in the order of `questions`.

    Args:
        new_tokens: how many are written greedily. emulate: see `serve_check`.
        shown: let the engine print what it does, instead of keeping it in a file.

    Raises:
        NotServed: the process ended before it answered.
        Interrupted: a stopping signal came.
    """
    place = Path(tempfile.mkdtemp(prefix="dist-spin-serve-"))
    try:
        request = {
            "exports": [asdict(question) | {"path": str(question.path.resolve())} for question in questions],
            "new_tokens": new_tokens,
            "tensor_parallel": tensor_parallel,
            "kv_cache_dtype": kv_cache_dtype,
        }
        (place / "request.json").write_text(json.dumps(request))
        shutil.copy(WORKER, place)  # beside nothing else, so that it cannot take our modules for others of that name
        say(f"starting vLLM of {python}")
        with (place / "log").open("w+") as log:
            out: Any = STDERR if shown else log  # standard output is for our results
            words = [
                os.path.abspath(python),
                str(place / WORKER.name),
                str(place / "request.json"),
                str(place / "answer.json"),
            ]
            code = _run(words, place, _environment(tensor_parallel) | ({EMULATE: "1"} if emulate else {}), out)
            log.seek(0)
            last = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "")
        found = json.loads((place / "answer.json").read_text()) if (place / "answer.json").exists() else {"exports": []}
        if len(found["exports"]) < len(questions):
            missing = questions[len(found["exports"])].path
            raise NotServed(f"vLLM ended with code {code} at {missing}: {last}", "--verbose shows all that it says")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found["engine"], [Answer(**answer) for answer in found["exports"]]


def _run(words: list[str], place: Path, environment: dict[str, str], out: Any) -> int:
    """The exit code of the engine's process; what it started, such as a worker for each part of the model, ends with it.

    Raises:
        Interrupted: a stopping signal came.
    """
    engine = subprocess.Popen(words, cwd=place, env=environment, stdout=out, stderr=out, start_new_session=True)
    names: list[str] = []

    def end(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        _end_group(engine.pid)

    with forwarded_to(end):
        code = engine.wait()
    _end_group(engine.pid)
    if names:
        raise Interrupted(f"stopped by {names[0]}", "the same command starts again")
    return code


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _environment(tensor_parallel: int) -> dict[str, str]:
    """That of the engine's process: ours, and what its build for CPUs needs.

    One process does all where nothing is shared out, so that an error is reported as itself.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // tensor_parallel)
    cpu = {"VLLM_CPU_KVCACHE_SPACE": str(KV_SPACE_GB), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tensor_parallel == 1 else {}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return cpu | {"OMP_NUM_THREADS": str(threads)} | os.environ | alone | quiet
