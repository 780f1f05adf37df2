"""Runs that version 0.1.0 left (commit 005f7c2) are continued, measured, reported, exported and compared by this code.

tests/data/runs_of_0_1_0.tar.xz holds a model of three layers, a text and four runs, all stages of them:
partial (stopped after step 3 of 30), whole (the same, not stopped), full (optimize to export), comparison.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

import dist_spin
from dist_spin.cli import main
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.tensor_file import load_tensors

ARCHIVE = Path(__file__).parent / "data" / "runs_of_0_1_0.tar.xz"
MODEL = ["model.path=model", "model.dtype=float32"]
LEARN = ["optimize.source=text:text.txt", "optimize.seq_len=32", "optimize.batch_size=2"]
QUANTIZE = [
    "quantize.source=text:text.txt",
    "quantize.seq_len=32",
    "quantize.n_sequences=4",
    "quantize.baselines=[none]",
]
MEASURE = ["evaluate.sources=[text:text.txt]", "evaluate.seq_len=32"]
ALL = [*MODEL, *LEARN, *QUANTIZE, *MEASURE, "optimize.steps=3"]

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the old runs, as the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def contents(run: Path) -> dict[str, bytes]:
    """Every file that holds results, not notes of who was at work."""
    patterns = ("rotations/*", "layers/*", "baselines/*/layers/*", "evaluations/*", "export/*/*.safetensors")
    return {str(path): path.read_bytes() for pattern in patterns for path in run.glob(pattern)}


def test_learning_continues_where_it_was_stopped(old: Path) -> None:
    before = read_lines(old / "partial" / "metrics.jsonl")
    assert [line["step"] for line in before] == [1, 2, 3]
    assert main(["optimize", "name=partial", "optimize.steps=30", *MODEL, *LEARN]) == 0
    after = read_lines(old / "partial" / "metrics.jsonl")
    assert [line["step"] for line in after] == list(range(1, 31))
    assert [line["loss"] for line in after[:3]] == [line["loss"] for line in before]
    learned, whole = (load_tensors(old / name / "rotations" / "final.safetensors")[0] for name in ("partial", "whole"))
    for name in ("R1", "R2"):  # equal on the processor that wrote them; others sum in another order
        torch.testing.assert_close(learned[name], whole[name], rtol=0, atol=1e-3)


def test_another_setting_is_refused_by_the_name_it_had(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "name=partial", "optimize.steps=30", *MODEL, *LEARN, "optimize.lr=0.7"]) == 2
    assert "optimize.lr = " in capsys.readouterr().err


def test_finished_stages_are_recognised(old: Path) -> None:
    before = contents(old / "full")
    for verb in ("optimize", "quantize", "evaluate"):
        assert main([verb, "name=full", *ALL]) == 0
    assert contents(old / "full") == before


def test_only_a_missing_layer_is_done_again(old: Path) -> None:
    before = contents(old / "full")
    missing = old / "full" / "layers" / "001.safetensors"
    missing.unlink()
    assert main(["quantize", "name=full", *ALL]) == 0
    made = load_tensors(missing)
    after = contents(old / "full")
    assert after.keys() == before.keys()
    key = str(missing)
    assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}
    missing.write_bytes(before[key])
    assert made[1]["fingerprint"] == load_tensors(missing)[1]["fingerprint"]


def test_a_missing_measurement_is_made_again_beside_the_others(old: Path) -> None:
    one, *others = sorted((old / "full" / "evaluations").iterdir())
    before = {path: path.read_bytes() for path in others}
    figure = json.loads(one.read_text())["ppl"]
    one.unlink()
    assert main(["evaluate", "name=full", *ALL]) == 0
    assert json.loads(one.read_text())["ppl"] == pytest.approx(figure, rel=1e-3)
    assert {path: path.read_bytes() for path in others} == before


def test_rows_of_before_fidelity_stay_and_stand_beside_one_that_has_it(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path: json.loads(path.read_text()) for path in (old / "full" / "evaluations").iterdir()}
    assert not any("kl" in row for row in files.values())
    again, row = next((path, row) for path, row in files.items() if row["rotation"] == "learned")
    again.unlink()
    before = {path: path.read_bytes() for path in files if path != again}
    assert main(["evaluate", "name=full", *ALL]) == 0
    assert f"{sum(r['a_bits'] < 16 for r in files.values()) - 1} rows were measured before" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    rows = json.loads((old / "full" / "results.json").read_text())
    (new,) = [row for row in rows if "kl" in row]
    assert new["ppl"] == pytest.approx(row["ppl"], rel=1e-3)
    assert 0 < new["kl"] < new["kl_p99"]
    assert 0 < new["top1"] < 1
    assert main(["report", str(old / "full")]) == 0
    (line,) = [line for line in (old / "full" / "report.md").read_text().splitlines() if f"{new['kl']:#.3g}" in line]
    assert "learned rotation" in line


def test_report_status_and_figures(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(old / "full")]) == 0
    assert "W4A4KV4" in (old / "full" / "report.md").read_text()
    assert main(["status", str(old / "full"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["plot", str(old / "partial"), "loss", "-o", "loss.png"]) == 0
    assert Path("loss.png").stat().st_size > 1000


def test_exports_are_loaded_recognised_and_made_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.arange(5, 25)[None]
    there = [old / "full" / "export" / name for name in ("hf", "hf-r4")]
    logits = [dist_spin.load(directory, device="cpu")(ids).logits for directory in there]
    assert all(torch.isfinite(some).all() for some in logits)
    assert main(["export", str(old / "full"), "--format", "hf", "--output", "again"]) == 0
    torch.testing.assert_close(dist_spin.load("again", device="cpu")(ids).logits, logits[0], rtol=0, atol=1e-4)


def test_a_comparison_is_taken_up_with_all_its_rows(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compare.methods=[rtn,smoothquant,ours]",
        "compare.weights=[rtn]",
        "compare.bits=[W4A8]",
        "compare.seeds=[0]",
    ]
    before = {path: path.read_bytes() for path in (old / "comparison" / "methods").rglob("*.safetensors")}
    measured = {path: path.read_bytes() for path in (old / "comparison" / "evaluations").iterdir()}
    assert before
    assert measured
    assert main(["compare", "name=comparison", *ALL, *words]) == 0
    assert "SmoothQuant" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (old / "comparison" / "methods").rglob("*.safetensors")} == before
    assert {path: path.read_bytes() for path in (old / "comparison" / "evaluations").iterdir()} == measured
