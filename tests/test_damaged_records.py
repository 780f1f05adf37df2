"""What a run notes as JSON and YAML, damaged: named in one line, set aside or made again; never a traceback."""

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.evaluate.measurements import read_rows
from dist_spin.report.logs import logs
from dist_spin.report.page import html_page, markdown_page
from dist_spin.report.run_summary import load_run_summary
from dist_spin.report.status import status
from dist_spin.report.status_text import status_text
from dist_spin.storage.atomic import append_line, read_lines, write_json
from dist_spin.storage.checked_json import CHECKSUM, add_checksum, remove_checksum
from dist_spin.storage.metrics import append_metrics, drop_metrics_after, read_metrics
from dist_spin.storage.results import load_results
from dist_spin.storage.run_directory import RunDir, check_fingerprint
from dist_spin.storage.run_records import read_settings
from dist_spin.storage.tensor_file import CorruptFile

pytestmark = pytest.mark.usefixtures("restored_process")

RECORDS = ("config.yaml", "fingerprint.json", "metrics.jsonl", "events.jsonl", "results.json", "evaluations")
DAMAGE = {
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: content[:40] + b"\xff\xfe" + content[40:],
    "another type": lambda content: b"[null, 7, [1]]\n",
    "nested": lambda content: b"[" * 100_000 + b"\n",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Settings of a run of two steps and two layers, with every stage."""
    place = tmp_path_factory.mktemp("damaged")
    sizes = ("optimize.steps=2", "quantize.n_sequences=8", "quantize.baselines=[none]")
    return tiny_run(place / "runs", "name=tiny", "model.dtype=float32", *sizes, model=place / "model")


@pytest.fixture(scope="module")
def finished(words) -> Path:
    """The run with these settings."""
    for stage in ("optimize", "quantize", "evaluate"):
        assert main([stage, *words]) == 0
    run = Path(words[0].partition("=")[2]) / "tiny"
    RunDir(run).event("submitted", stage="quantize", job="12", part=["--layers", "0:1"])
    RunDir(run).event("job_failed", job="0:1", layers=[0, 1], code=1)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


def files_of(run: Path) -> list[Path]:
    return sorted(
        path for name in RECORDS for path in ((run / name).iterdir() if name == "evaluations" else [run / name])
    )


def looked_at(run: Path, *, draw: bool = False) -> None:
    """Everything that reads these files without computing anything; an error for the user, of one line, is an answer."""

    def page() -> bytes:
        summary = load_run_summary(run)
        return (markdown_page(summary) + (html_page(summary) if draw else "")).encode()

    looks: list[Callable[[], object]] = [
        lambda: json.dumps(figures := status(run)).encode() + status_text(figures).encode(),
        lambda: logs(run),
        page,
        lambda: load_results(RunDir(run), lambda text: None),
        lambda: check_fingerprint(run / "fingerprint.json", {"seed": 1}, "run tiny"),
        lambda: drop_metrics_after(run, 1),
        *(functools.partial(read_rows, path) for path in (run / "evaluations").iterdir()),
    ]
    for look in looks:
        problem = ""
        try:
            look()
        except (UserError, CorruptFile) as error:
            problem = str(error)
        assert "\n" not in problem


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_record_is_named_and_never_a_traceback(run, damage, capfd):
    for path in files_of(run):
        whole = path.read_bytes()
        path.write_bytes(DAMAGE[damage](whole))
        looked_at(run, draw=path.name in ("metrics.jsonl", "results.json"))
        code = main(["status", str(run)])
        said = capfd.readouterr()
        assert code == (2 if path.name == "config.yaml" else 0), (path, said.err)
        if path.name in ("config.yaml", "results.json"):
            assert str(path) in said.err
        if path.name == "config.yaml":
            assert len(said.err.splitlines()) == 1
            assert "start the run with its own configuration again" in said.err
        path.write_bytes(whole)


def test_a_configuration_that_ends_after_any_line_is_damaged(run):
    path = run / "config.yaml"
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:number]))
        with pytest.raises(UserError, match="is damaged"):
            read_settings(run)


@pytest.mark.slow
@given(data=st.data())
@hypothesis_settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_no_mutation_of_any_record_ends_in_a_traceback(run, data):
    path = data.draw(st.sampled_from(files_of(run)))
    whole = path.read_bytes()
    try:
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, max(0, len(content) - 1)))
            size = data.draw(st.sampled_from([0, 1, 1, 2, 40]))
            content[at : at + size] = data.draw(
                st.one_of(
                    st.binary(max_size=3),
                    st.sampled_from(
                        b'0 1 9 - e . , : " { } [ ] \n null true "x" 1e999 99999999999999 \\ud800 []'.split(b" ")
                    ),
                )
            )
        path.write_bytes(bytes(content))
        looked_at(run)
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
def test_any_entry_of_any_record_may_be_of_another_type_or_missing(run):
    """What parses may still be wrong."""
    draw = random.Random(0)
    for path in (run / name for name in RECORDS if name.endswith((".json", ".jsonl"))):
        whole = path.read_bytes()
        for _ in range(12):
            values = read_lines(path) if path.suffix == ".jsonl" else [json.loads(whole)]
            for row in (row for value in values for row in (value if isinstance(value, list) else [value])):
                row.pop(CHECKSUM, None)
                for name in [name for name in row if draw.random() < 0.1]:
                    row[name] = draw.choice([None, -1, 1e300, "x", [], {}, [[]], True, 10**12])
                for name in [name for name in row if draw.random() < 0.03]:
                    del row[name]
            path.write_text("\n".join(map(json.dumps, values)) + "\n")
            looked_at(run)
            path.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DAMAGE, "a digit"])
def test_a_damaged_measurement_is_set_aside_and_measured_again(words, run, kind, capfd):
    words = [f"output_dir={run.parent}", *words[1:]]
    before = json.loads((run / "results.json").read_text())
    path = next(path for path in (run / "evaluations").iterdir() if '"weights": "gptq"' in path.read_text())
    row = json.loads(path.read_text())
    if kind == "a digit":
        path.write_text(path.read_text().replace(str(row["ppl"]), str(row["ppl"] + 1)))
    else:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    assert main(["evaluate", *words]) == 0
    said = capfd.readouterr().err
    assert f"{path} " in said
    assert f"kept as {path.stem}.stale, measuring again" in said
    assert path.with_suffix(".stale").exists()
    after = json.loads((run / "results.json").read_text())
    assert [entry["ppl"] for entry in after] == [entry["ppl"] for entry in before]
    assert read_rows(path)[0][0]["ppl"] == row["ppl"]


@pytest.mark.slow
def test_measurements_of_version_0_1_are_taken_and_a_wrong_digit_in_them_is_seen(words, run, capfd):
    words = [f"output_dir={run.parent}", *words[1:]]
    paths = sorted((run / "evaluations").iterdir())
    for path in paths:
        row = json.loads(path.read_text())
        del row[CHECKSUM]
        write_json(path, row)
    before = {path: path.read_bytes() for path in paths}
    assert main(["evaluate", *words]) == 0
    assert {path: path.read_bytes() for path in paths} == before
    assert "set aside" not in capfd.readouterr().err
    row = json.loads(paths[0].read_text())
    write_json(paths[0], row | {"ppl": row["ppl"] * (1 + 1e-6)})
    assert main(["evaluate", *words]) == 0
    assert f"{paths[0].stem}.stale, measuring again" in capfd.readouterr().err
    assert json.loads(paths[0].read_text())["ppl"] == row["ppl"]


BOMBS = {
    "nested": "optimize: " + "[" * 3000 + "]" * 3000,
    "aliases of aliases": "a: &a [x, x]\n"
    + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in ("ab", "bc", "cd")),
    "a long alias": "name: &a " + "x" * 1000 + "\nb: [" + ", ".join(["*a"] * 200) + "]\n",
    "large": "#" * (2**17 + 1),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("verb", ["status", "report", "logs", "plot", "generate", "export"])
def test_a_config_of_a_run_is_bounded_as_a_users_own(tmp_path, capfd, verb, bomb):
    (tmp_path / "config.yaml").write_text(BOMBS[bomb])
    (tmp_path / "events.jsonl").write_text("")
    more = {"plot": ["loss"], "generate": ["text"], "export": ["--format", "hf"]}.get(verb, [])
    code = main([verb, str(tmp_path), *more])
    printed = capfd.readouterr().err
    if verb == "logs":  # which reads no settings
        assert (code, printed) == (0, "")
    else:
        assert code == 2
        (line,) = printed.splitlines()
        assert str(tmp_path / "config.yaml") in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_and_settings_are_written_anew(words, run, damage, capfd):
    words = [f"output_dir={run.parent}", *words[1:]]
    files = [run / "results.json", run / "config.yaml", run / "metrics.jsonl", run / "events.jsonl"]
    results = json.loads(files[0].read_text())
    for path in files:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert main(["evaluate", *words]) == 0
    assert "writes it anew" in capfd.readouterr().err
    assert json.loads(files[0].read_text()) == results
    assert main(["quantize", *words]) == 0
    assert main(["optimize", *words]) == 0
    capfd.readouterr()
    assert main(["status", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_fingerprint_stops_a_start_with_the_way_out(words, run, damage, capfd):
    words = [f"output_dir={run.parent}", *words[1:]]
    path = run / "fingerprint.json"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert main(["optimize", *words]) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert str(path) in said
    assert "delete it if" in said
    path.unlink()
    assert main(["optimize", *words]) == 0


def test_a_row_keeps_its_checksum_through_json():
    row = {"ppl": 5.25, "losses": [1.0, 2.5], "dataset": "größe", "stderr": None}
    stored = json.loads(json.dumps(add_checksum(row)))
    assert remove_checksum(stored, lambda content: False) == row
    for name, value in (("ppl", 5.26), ("losses", [1.0]), ("dataset", "grösse"), ("new", 1)):
        with pytest.raises(ValueError, match="checksum"):
            remove_checksum({**stored, name: value}, lambda content: True)


def test_a_torn_line_spoils_neither_the_one_before_nor_the_one_after(tmp_path):
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 1})
    with path.open("ab") as stream:
        stream.write(b'{"n": 2, "te')
    append_line(path, {"n": 3})
    append_line(path, {"n": 4})
    assert [line["n"] for line in read_lines(path)] == [1, 3, 4]


def test_steps_that_were_not_saved_leave_their_lines_and_no_step_stands_twice(tmp_path):
    for step in (1, 2, 2, 3, 4):
        append_metrics(tmp_path, step, dict.fromkeys(("loss", "grad_norm", "lr", "seconds"), 1.0))
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": "2"}\n[1]\n{"st')
    drop_metrics_after(tmp_path, 3)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_step_whose_loss_was_not_finite_keeps_its_line_when_a_run_continues(tmp_path, loss):
    for step, figure in ((1, 2.0), (2, loss), (3, 1.5)):
        append_metrics(tmp_path, step, {"loss": figure, "grad_norm": figure, "lr": 0.1, "seconds": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()
    drop_metrics_after(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]  # what can be drawn
