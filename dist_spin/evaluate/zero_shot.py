"""Zero-shot tasks of lm-evaluation-harness, with its own prompts and metrics, on a model that is measured layer by layer.

    dist-spin evaluate CONFIG.yaml evaluate.tasks=[piqa,arc_easy] evaluate.tasks_dir=/data/tasks

Data come from the hub, from its local cache, or from copies that
`hf download --repo-type dataset OWNER/NAME --local-dir TASKS_DIR/OWNER/NAME` makes. A task whose data cannot be had is left
out, with a line that says so.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_spin.config.run import RunConfig
from dist_spin.data import require_hub
from dist_spin.errors import Interrupted, NumericsError, UserError
from dist_spin.evaluate.layerwise_model import LayerwiseModel
from dist_spin.evaluate.loglikelihood import log_likelihoods
from dist_spin.evaluate.measurements import load_rows, save_rows
from dist_spin.evaluate.targets import EvalTarget, describe, target_identity
from dist_spin.model.weights import ModelFiles
from dist_spin.pipeline.model import check_vocabulary, model_dtype
from dist_spin.runtime.distributed import World, all_ranks_equal, any_rank, on_rank0, raise_on_any_failure
from dist_spin.runtime.progress import warn
from dist_spin.runtime.signals import StopRequest
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import identity_hash

try:
    import datasets  # type: ignore[import-untyped]
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as run_harness
    from lm_eval.models.utils import has_bos_prefix, resolve_max_length
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"evaluate.tasks needs lm-evaluation-harness ({error})", "pip install 'dist-spin[lm-eval]'"
    ) from error
BOOTSTRAP = 1000  # draws for the standard error of a perplexity; that of an accuracy has a closed form


@dataclass(frozen=True)
class Source:
    """A task's file within the harness, and its data on the hub."""

    file: str
    repository: str
    subset: str | None = None


SOURCES = {
    "boolq": Source("super_glue/boolq/default.yaml", "aps/super_glue", "boolq"),
    "piqa": Source("piqa/piqa.yaml", "baber/piqa"),
    "siqa": Source("siqa/siqa.yaml", "lighteval/siqa"),
    "hellaswag": Source("hellaswag/hellaswag.yaml", "Rowan/hellaswag"),
    "winogrande": Source("winogrande/default.yaml", "allenai/winogrande", "winogrande_xl"),
    "arc_easy": Source("arc/arc_easy.yaml", "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Source("arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge"),
    "openbookqa": Source("openbookqa/openbookqa.yaml", "allenai/openbookqa", "main"),
    "lambada_openai": Source("lambada/lambada_openai.yaml", "EleutherAI/lambada_openai", "default"),
}


class LayerwiseLM(TemplateLM):
    """An evaluation target as the harness sees a model: tokenised as by the harness's `hf` model, scored layer by layer.

    Under several ranks each runs the harness on the same requests; scoring them is shared out.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        files: ModelFiles,
        run: RunDir,
        target: EvalTarget,
        stop: StopRequest | None = None,
    ) -> None:
        super().__init__()
        self._stop = stop
        self._parts = (config, world, files, run, target)
        self.tokenizer = files.tokenizer()

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the tokenizer decides on BOS, unless the text begins with it already."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        config, world, files, run, target = self._parts
        if not all_ranks_equal(int(hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:15], 16)):
            raise UserError("ranks read different data for the same tasks", "give evaluate.tasks_dir one shared copy")
        token_ids = [token for _, *parts in requests for part in parts for token in part]
        check_vocabulary(torch.tensor(token_ids), files.shape, "the text of a task")
        return log_likelihoods(
            lambda: LayerwiseModel(config, world, files, run, target),
            world,
            [(context, continuation) for _, context, continuation in requests],
            layers=files.shape.layers,
            max_length=resolve_max_length(files.config, self.tokenizer),
            token_bytes=files.shape.hidden * model_dtype(config).itemsize,
            what=f"zero-shot, {target.label}, {target.weights} weights",
            stop=self._stop,
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not asked for by any task of `SOURCES`."""
        raise UserError("a task asks for the perplexity of whole texts", "give the text as one of evaluate.sources")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not asked for by any task of `SOURCES`."""
        raise UserError("a task asks the model to write text", "name tasks that compare log-likelihoods")


def zero_shot(
    config: RunConfig, world: World, files: ModelFiles, run: RunDir, eval_targets: list[EvalTarget], stop: StopRequest
) -> list[dict[str, Any]]:
    """Measure every target on every task whose data can be had; a row for each target, task and metric.

    Raises:
        Interrupted: a signal came; what is measured is kept.
        NumericsError: a model's output is not finite.
    """
    tasks = load_tasks(config)
    rows: list[dict[str, Any]] = []
    for target in eval_targets if tasks else ():
        rows += measure(config, world, files, run, target, tasks, stop)
        if any_rank(bool(stop)):
            raise Interrupted("stopped by a signal between two measurements", "the same command continues")
    return rows


def load_tasks(config: RunConfig) -> dict[str, Any]:
    """The harness's task objects by our names. What rank 0 cannot load is left out everywhere, and said."""
    e = config.evaluate
    folder = Path(config.path(e.tasks_dir)) if e.tasks_dir else None
    tasks: dict[str, Any] = {}

    def load_all() -> list[str]:
        for name in e.tasks:
            try:
                tasks[name] = load_task(name, folder)
            except UserError as error:
                warn(f"dist-spin: {name} is left out: {error}")
        return list(tasks)

    names = on_rank0(load_all)
    # The others only afterwards, when the cache is filled.
    raise_on_any_failure(lambda: None if tasks else tasks.update({name: load_task(name, folder) for name in names}))
    return tasks


def load_task(name: str, folder: Path | None) -> Any:
    """One task of the harness with its data.

    Raises:
        UserError: the data cannot be had.
    """
    source = SOURCES[name]
    harness_tasks = Path(lm_eval.__file__).parent / "tasks"
    # Only few-shot prompts read the training part.
    changes: dict[str, Any] = {"include": str(harness_tasks / source.file), "training_split": None}
    if folder:
        changes |= local_copy(folder, source)
    else:
        require_hub(source.repository, f"the task {name}", "evaluate.tasks_dir=DIR with a copy of its data")
    with tempfile.TemporaryDirectory() as directory, silenced():
        path = Path(directory) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(changes))
        try:
            (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
        except Exception as error:  # whatever the harness, the hub or a file format throws is the user's to put right
            reason = " ".join(str(error).split()) or type(error).__name__
            remedy = f"hf download --repo-type dataset {source.repository} --local-dir {copy_path(folder, source)}"
            raise UserError(f"its data cannot be read ({reason[:300]})", remedy) from error
    task.set_config(key="num_fewshot", value=0)
    return task


def copy_path(folder: Path | None, source: Source) -> Path:
    """Where a copy of a task's data is looked for."""
    return (folder or Path("TASKS_DIR")) / source.repository


def local_copy(folder: Path, source: Source) -> dict[str, Any]:
    """What the harness is told to read: a copy of the repository, whose README.md or folders say which files are meant.

    Raises:
        UserError: there is no copy.
    """
    copy = copy_path(folder, source)
    if not copy.is_dir():
        remedy = f"hf download --repo-type dataset {source.repository} --local-dir {copy}"
        raise UserError(f"{copy} does not exist", remedy)
    with silenced():
        try:
            subsets = datasets.get_dataset_config_names(str(copy))
        except Exception:  # without a README.md and with files in unusual places; folders may still tell
            subsets = []
    named = source.subset in subsets
    # Where a README.md names the files, `datasets` would take another copy's data from its cache for these.
    cached = Path(datasets.config.HF_DATASETS_CACHE) / f"copy-{copy_fingerprint(copy)}"
    options = {"cache_dir": str(cached)}
    if source.subset and not named and (copy / source.subset).is_dir():
        options["data_dir"] = source.subset
    return {
        "dataset_path": str(copy),
        "dataset_name": source.subset if named else None,
        "dataset_kwargs": options,
    }


def copy_fingerprint(copy: Path) -> str:
    """A hash that changes when a file below `copy` does: of names, sizes and times."""
    files = ((path, path.stat()) for path in sorted(copy.rglob("*")) if path.is_file())
    stamps = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep the progress bars and messages of the harness and of `datasets` off the terminal, which shows our progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def measure(
    config: RunConfig,
    world: World,
    files: ModelFiles,
    run: RunDir,
    target: EvalTarget,
    tasks: dict[str, Any],
    stop: StopRequest,
) -> list[dict[str, Any]]:
    """One target on all tasks; those that were measured before are read from their files, the others are run together."""
    model = {**describe(config, target), "layers": target.fingerprint, **target_identity(config, files, target)}
    limit = config.evaluate.task_limit
    identities = {
        name: identity_hash(
            {**model, "task": name, "limit": limit, "data": digest(task, limit), "lm_eval": lm_eval.__version__}
        )
        for name, task in tasks.items()
    }
    measured = {name: load_rows(run, identity) for name, identity in identities.items()}
    missing = {name: task for name, task in tasks.items() if measured[name] is None}
    if missing:
        lm = LayerwiseLM(config, world, files, run, target, stop)
        began = time.monotonic()
        # The harness would fork a process with threads, and perhaps CUDA, for its draws.
        os.environ["DISABLE_MULTIPROC"] = "1"
        with silenced():
            results = run_harness(
                lm,
                {"tasks": {task.task_name: task for task in missing.values()}, "groups": {}, "group_map": {}},
                limit=limit or None,
                bootstrap_iters=BOOTSTRAP if world.is_rank0 else 0,
                log_samples=False,
            )
        seconds = time.monotonic() - began
        requests = {name: len(task.instances) for name, task in missing.items()}
        for name, task in missing.items():
            share = seconds * requests[name] / sum(requests.values())
            rows = [
                {**describe(config, target), "task": name, **figures, "seconds": round(share, 2)}
                for figures in metrics(results["results"][task.task_name], results["n-samples"][task.task_name])
            ]
            if not all(math.isfinite(row["value"]) for row in rows):
                problem = f"{target.label} on {name}: the log-likelihoods are not finite"
                raise NumericsError(problem, "check the model's dtype and the quantisers")
            save_rows(run, identities[name], rows)
            measured[name] = rows
    return on_rank0(lambda: [row for rows in measured.values() for row in rows or ()])


def digest(task: Any, limit: int) -> str:
    """SHA-256 (hex) of the items that are measured, right answers included."""
    docs = (json.dumps(doc, sort_keys=True, default=str) for _, doc in task.doc_iterator(limit=limit or None))
    return hashlib.sha256("\n".join(docs).encode()).hexdigest()


def metrics(results: dict[str, Any], counts: dict[str, int]) -> list[dict[str, Any]]:
    """Name, value, standard error and number of items of each metric that the harness reports."""
    out = []
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{kind}")
            stderr = error if isinstance(error, float) and math.isfinite(error) else None
            out.append({"metric": metric, "value": float(value), "stderr": stderr, "n": counts["effective"]})
    return out
