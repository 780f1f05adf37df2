"""Comparisons by several processes: they share each row, or take whole rows, and find what one process finds."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from ranks import Job, command
from tiny import tiny_run

from dist_spin.errors import EXIT_INTERRUPTED
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.locks import exclusive
from dist_spin.storage.results import merge_results, results
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(tmp_path) -> list[str]:
    return tiny_run(
        tmp_path,
        "quantize.n_sequences=8",
        *("compare.methods=[gptq, smoothquant, quarot, spinquant_no_had, ours]", "compare.seeds=[0]"),
        *("compare.weights=[rtn]", "compare.bits=[W4A8, W4A4KV4]"),
        sequences=60,
    )


def perplexities(tmp_path: Path, name: str) -> dict[tuple, float]:
    rows = json.loads(Path(tmp_path, name, "results.json").read_text())
    return {(r["system"], r["weights"], r["a_bits"], r["seed"]): r["ppl"] for r in rows}


def test_two_ranks_measure_what_one_does(tmp_path, words):
    job = Job(2, command, "compare", "name=two", *words, log=tmp_path / "log")
    job.wait_for(lambda: len(list((tmp_path / "two" / "evaluations").glob("*.json"))) >= 3)
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == [EXIT_INTERRUPTED] * 2, job.log.read_text()
    assert 3 <= len(perplexities(tmp_path, "two")) < 11
    assert Job(2, command, "compare", "name=two", *words, log=tmp_path / "log").wait() == [0, 0]
    assert Job(1, command, "compare", "name=one", *words, log=tmp_path / "log1").wait() == [0]
    one, two = perplexities(tmp_path, "one"), perplexities(tmp_path, "two")
    assert len(one) == len(two) == 11
    for key, ppl in one.items():
        assert two[key] == pytest.approx(ppl, rel=1e-9), key


@pytest.mark.slow
def test_processes_that_take_whole_rows(tmp_path, words):
    """One is asked to stop, one is killed in the middle of its work; then both go on. Nothing is measured twice."""
    words += ["compare.parallel=rows", "compare.weights=[rtn, gptq]", "compare.seeds=[0, 1]"]
    many = [*words, "name=many"]
    evaluations = tmp_path / "many" / "evaluations"

    def measured() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in evaluations.glob("*.json")}

    job = Job(2, command, "compare", *many, log=tmp_path / "log")
    job.wait_for(lambda: len(measured()) >= 4)
    job.signal(signal.SIGTERM, 0)
    job.signal(signal.SIGKILL, 1)
    assert job.wait() == [EXIT_INTERRUPTED, -signal.SIGKILL], job.log.read_text()
    before = measured()
    again = Job(2, command, "compare", *many, log=tmp_path / "log")
    assert again.wait() == [0, 0], again.log.read_text()
    said = again.log.read_text()
    assert said.count("tokens in windows of") >= 1  # the table, by the last one to end
    assert before.items() <= measured().items()

    # Alone, and not by parts: the same rows in the same order, each of them one measurement.
    one = Job(1, command, "compare", "name=one", *words, "compare.parallel=ranks", log=tmp_path / "log1")
    assert one.wait() == [0]
    assert list(perplexities(tmp_path, "many").items()) == list(perplexities(tmp_path, "one").items())
    assert len(measured()) == len(perplexities(tmp_path, "one")) == 1 + 2 * (1 + 2 + 2 * 2 * 3)
    # Four starts, each a rank by itself; no lock of rows is left behind, and no layers.
    events = read_lines(tmp_path / "many" / "events.jsonl")
    jobs = [e for e in events if e["event"] == "job" and e["stage"] == "compare"]
    assert [e["ranks"] for e in jobs] == [1] * 4
    assert len({e["part"] for e in jobs}) == 4
    assert all(e["part"].startswith(f"{socket.gethostname()}-") for e in jobs)
    assert not list((tmp_path / "many").glob("locks/rows.*"))
    left = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "many" / "compare").iterdir())
    assert left == sorted(["ours-seed1", *["spinquant_no_had-seed0", "spinquant_no_had-seed1"] * 2])


def test_who_has_nothing_left_to_do_leaves_the_rest_to_the_others(tmp_path, words):
    words += ["compare.parallel=rows", "name=run", "compare.methods=[gptq, ours]"]
    run = RunDir(tmp_path / "run")
    with exclusive(run.path / "locks" / "rows.learned.lock", "rows of learned"):  # this process is at them
        job = Job(1, command, "compare", *words, log=tmp_path / "log")
        assert job.wait() == [0], job.log.read_text()
    said = job.log.read_text()
    assert "other processes are at learned; the last one to end shows the table" in said
    assert "tokens in windows of" not in said
    assert {row["system"] for row in results(run, "compare")} == {"full precision", "GPTQ"}
    job = Job(1, command, "compare", *words, log=tmp_path / "log")
    assert job.wait() == [0], job.log.read_text()
    assert "tokens in windows of" in job.log.read_text()
    assert {row["system"] for row in results(run, "compare")} == {"full precision", "GPTQ", "ours"}


def add_rows(run: Path, first: int) -> None:
    """A process that adds 20 rows one by one."""
    for number in range(first, first + 20):
        merge_results(RunDir(run), "compare", [{"number": number, "by": os.getpid()}], lambda row: (row["number"],))


def test_rows_of_several_processes_do_not_overwrite_each_other(tmp_path):
    jobs = [Job(1, add_rows, tmp_path / "run", first, log=tmp_path / f"log{first}") for first in (0, 20)]
    assert [job.wait() for job in jobs] == [[0], [0]]
    assert sorted(row["number"] for row in results(RunDir(tmp_path / "run"), "compare")) == list(range(40))
