"""The report of a comparison: its tables, the spread of random rotations, and how far it is."""

import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from tiny import tiny_run

from dist_spin.cli import main
from dist_spin.report.figures import drawings
from dist_spin.report.run_summary import load_run_summary
from dist_spin.report.tables import result_tables
from dist_spin.storage.atomic import read_lines, write_json
from dist_spin.storage.results import FIDELITY, PERPLEXITY

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def words(tmp_path) -> list[str]:
    return tiny_run(
        tmp_path,
        *("name=tiny", "model.dtype=float32", "optimize.steps=2", "quantize.n_sequences=4", "evaluate.max_sequences=4"),
        *("compare.methods=[rtn, quarot]", "compare.weights=[rtn]", "compare.bits=[W4A8, W4A4KV4]"),
        sequences=40,
    )


@pytest.mark.slow
def test_tables_and_spread(browser, tmp_path, words):
    words += ["compare.seeds=[0, 1]", "compare.spread_seeds=3"]
    assert main(["compare", *words]) == 0
    assert main(["report", str(tmp_path / "tiny")]) == 0
    run_summary = load_run_summary(tmp_path / "tiny")
    assert run_summary.missing == [
        f"activation statistics: not measured yet (dist-spin report {tmp_path}/tiny/config.yaml)"
    ]
    tables = result_tables(run_summary)
    (table, unrounded) = (each for each in tables if each.title.endswith(f", {PERPLEXITY.title}"))
    assert len(tables) == 2 * (1 + len(FIDELITY))
    for each in tables:  # seeds are averaged in each of them
        assert any("± " in cell.text for row in each.rows for cell in row)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert table.heads[1:] == ["weights", "W4A8KV16", "W4A4KV4"]
    assert set(rows) == {"RTN", "QuaRot, clipped", "random Hadamard", "random orthogonal", "ours"}

    def measured(system: str, bits: tuple[int, int]) -> list[float]:
        return [r["ppl"] for r in run_summary.rows if r["system"] == system and (r["w_bits"], r["k_bits"]) == bits]

    for system, count in (("QuaRot, clipped", 2), ("random Hadamard", 3), ("ours", 2)):
        values = measured(system.removesuffix(", clipped"), (4, 4))
        assert len(values) == count
        assert rows[system][2] == f"{mean(values):.3f} ± {stdev(values):.3f} (n={count})"
    assert rows["ours"][1] == "–"
    for column, kv in ((2, 16), (3, 4)):
        bold = [row[0].text for row in table.rows if row[column].best]
        shown = [system for system in rows if rows[system][column - 1] != "–"]
        lowest = min((mean(measured(system.removesuffix(", clipped"), (4, kv))), system) for system in shown)
        assert bold == [lowest[1]]
    assert unrounded.heads[2:] == ["W16A4KV4"]
    assert {row[0].text for row in unrounded.rows} == {"random Hadamard", "random orthogonal", "ours"}

    figures = [drawing for drawing in drawings(run_summary) if drawing.section == "seeds"]
    assert [figure.title.split(",")[0] for figure in figures] == ["W16A4KV4", "W4A4KV4"]
    for figure, bits in zip(figures, ((16, 4), (4, 4)), strict=True):
        ours = [f"{value:.3f}" for value in measured("ours", bits)]
        assert f"learned: {', '.join(ours)}." in figure.caption
        axes = figure.draw().axes[0]
        points = [line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 3]
        assert sorted(np.concatenate(points)) == sorted(
            measured("random Hadamard", bits) + measured("random orthogonal", bits)
        )
        assert [text.get_text() for text in axes.texts] == ["learned"]
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "comparison complete" in page
    assert "dist-spin compare tiny.yaml</code>" in page
    assert "dist-spin run" not in page
    for width in (1280, 400):
        assert looked_at(browser, tmp_path / "tiny" / "report.html", width) == {"seeds-0", "seeds-1"}
    assert "\ndist-spin compare tiny.yaml\n```\n" in (tmp_path / "tiny" / "report.md").read_text()


def looked_at(browser, page: Path, width: int) -> set[str]:
    """Names of the figures of random rotations in a browser window, where nothing is wider than that and nothing is amiss."""
    tab = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(f"file://{page}")
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tables = tab.eval_on_selector_all(
        ".scroll",
        """all => all.slice(0, 2).map(s => {
             s.style.width = '200px'; s.scrollLeft = 9999;
             const left = s.querySelector('td').getBoundingClientRect().left - s.getBoundingClientRect().left;
             return [s.scrollLeft, left] })""",
    )
    # Names stay in sight, however far a table is scrolled.
    assert all(scrolled > 20 and 0 <= left < 3 for scrolled, left in tables), tables
    figures = tab.eval_on_selector_all(
        "#seeds figure",
        "all => all.map(f => [f.id, f.querySelector('svg').getBBox().width, f.getBoundingClientRect().width])",
    )
    assert all(drawn > 100 and wide > 250 for _, drawn, wide in figures), figures
    tab.close()
    return {name for name, _, _ in figures}


def test_a_comparison_that_learns_nothing_or_is_not_done(capsys, tmp_path, words):
    run: Path = tmp_path / "tiny"
    words += ["compare.methods=[rtn]", "compare.seeds=[0]"]
    assert main(["compare", *words]) == 0
    assert (run / "config.yaml").exists()
    assert [e["rows"] for e in read_lines(run / "events.jsonl") if e["event"] == "compare"] == [3]
    assert main(["report", str(run)]) == 0
    assert "comparison complete" in (run / "report.html").read_text()
    assert not any("loss" in line or "rounding" in line for line in load_run_summary(run).missing)
    write_json(run / "results.json", json.loads((run / "results.json").read_text())[:2])  # as while it goes on
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "comparison: 2 of 3 rows" in page
    assert "the comparison: 2 of 3 rows are measured (dist-spin compare)" in page
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    assert "compare   2 of 3 rows in results.json" in capsys.readouterr().out
