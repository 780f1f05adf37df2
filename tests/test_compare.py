"""`dist-spin compare`: what is planned, what each row means, and that nothing is measured or rounded twice."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from tiny import terminate_when, tiny_run, write_model

from dist_spin.cli import main
from dist_spin.compare.plan import Trial, plan_trials, settings_of, sharing_key, work_units
from dist_spin.config.bit_columns import parse_bits, parse_column
from dist_spin.config.compare import CompareConfig
from dist_spin.config.loader import load_config
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.errors import UserError
from dist_spin.evaluate.tables import comparison_table
from dist_spin.storage.atomic import read_lines
from dist_spin.storage.results import bits_label
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint with two texts; `tiny_run` adds tokens.npy."""
    path = write_model("gqa_tied", tmp_path_factory.mktemp("model"))
    np.save(path / "other.npy", np.random.default_rng(1).integers(3, 60, (40, 20)))
    return path


@pytest.fixture
def words(model, tmp_path) -> list[str]:
    texts = ", ".join(f"tokens:{model / name}" for name in ("tokens.npy", "other.npy"))
    more = ["optimize.steps=2", "optimize.optimizer=cayley_adam", "optimize.lr=0.02", "quantize.n_sequences=8"]
    more += ["compare.methods=[gptq, hadamard, quarot, quarot_no_clips, spinquant_no_had, ours]"]
    more += ["compare.bits=[W4A16, W4A4KV4]", "compare.weights=[gptq]", "compare.seeds=[0, 1]"]
    return tiny_run(tmp_path, "name=tiny", f"evaluate.sources=[{texts}]", *more, model=model, sequences=60)


def rows_of(run: Path) -> list[dict]:
    return [row for row in json.loads((run / "results.json").read_text()) if row["stage"] == "compare"]


def test_bits_are_read_from_text():
    assert [parse_bits(t) for t in ("W4A4KV4", "W4A16", "W16A4KV8")] == [(4, 4, 4), (4, 16, 16), (16, 4, 8)]
    assert [parse_bits(t) for t in ("W4", "A4W4", "W4A4KV9", "W1A4", "w4a4", "W4A4KV4 ")] == [None] * 6
    whole = "int"
    named = {
        "W4A4-nvfp4": ((4, 4, 16), ("nvfp4", "nvfp4", whole)),
        "W4A16-mxfp4": ((4, 16, 16), ("mxfp4", whole, whole)),
        "W8A8-fp8": ((8, 8, 16), ("fp8", "fp8", whole)),
        "W8A8KV8-fp8": ((8, 8, 8), ("fp8", "fp8", "fp8")),
        "W4A4-mxfp4-KV8-fp8": ((4, 4, 8), ("mxfp4", "mxfp4", "fp8")),
        "W4-mxfp4-A8-mxfp8": ((4, 8, 16), ("mxfp4", "mxfp8", whole)),
        "W4-A4-nvfp4-KV4": ((4, 4, 4), (whole, "nvfp4", whole)),
        "W16A4-nvfp4": ((16, 4, 16), (whole, "nvfp4", whole)),
    }
    for text, (widths, formats) in named.items():
        assert parse_column(text) == (widths, formats)
        row = dict(zip(("w_bits", "a_bits", "k_bits", "v_bits"), (*widths, widths[2]), strict=True))
        row |= dict(zip(("w_format", "a_format", "kv_format"), formats, strict=True))
        assert bits_label(row) == text
    assert [parse_column(t) for t in ("W4A4-fp8", "W4A4-nf4", "nvfp4-W4A4", "W4A4-", "W4A4-nvfp4-fp8", "B4-nvfp4")] == [
        None
    ] * 6
    for wrong in ({"bits": ["W4A4KV9"]}, {"methods": ["rtn", "rtn"]}, {"seeds": []}):
        with pytest.raises(UserError, match=f"compare.{next(iter(wrong))}"):
            CompareConfig(**wrong)


def test_the_plan_names_everything_once(words):
    with pytest.raises(UserError, match=r"compare\.methods has 'awq'.*use some of rtn, gptq, "):
        plan_trials(load_config(None, [*words, "compare.methods=[rtn, awq]"]))
    config = load_config(None, [*words, "compare.weights=[rtn, gptq]", "compare.spread_seeds=3"])
    plan = plan_trials(config)
    assert len(plan) == len(set(plan))
    assert plan[0] == Trial("full", 0, "none", (16, 16, 16))
    # GPTQ's row is no rotation rounded by GPTQ: neither seeds nor other roundings change it.
    assert [e.weights for e in plan if e.method == "gptq"] == ["gptq", "gptq"]
    for method in ("quarot", "spinquant_no_had"):
        wanted = {(s, w, b) for s in (0, 1) for w in ("rtn", "gptq") for b in ((4, 16, 16), (4, 4, 4))}
        assert {(e.seed, e.weights, e.bits) for e in plan if e.method == method} == wanted
    spread = {(s, w, b) for s in range(3) for w, b in (("none", (16, 4, 4)), ("rtn", (4, 4, 4)))}
    assert {(e.seed, e.weights, e.bits) for e in plan if e.method == "orthogonal"} == spread
    assert spread <= {(e.seed, e.weights, e.bits) for e in plan if e.method == "hadamard"}
    assert {e.seed for e in plan if e.method == "ours" and e.bits == (16, 4, 4)} == {0, 1}  # the marks


def test_units_learn_nothing_that_another_unit_learns(words):
    more = ["compare.methods=[gptq, smoothquant, quarot, quarot_no_clips, spinquant_had, ours]"]
    more += ["compare.weights=[rtn, gptq]", "compare.spread_seeds=1", "compare.parallel=rows"]
    config = load_config(None, [*words, *more])
    plan = plan_trials(config)
    units = work_units(config, plan)
    assert sorted(map(str, plan)) == sorted(str(e) for groups in units.values() for group in groups for e in group)
    for groups in units.values():
        assert all(len({sharing_key(trial) for trial in group}) == 1 for group in groups)

    def learned_by(name: str) -> set[str]:
        trials = [trial for group in units[name] for trial in group]
        learning = [e for e in trials if e.method in ("ours", "spinquant_had")]
        runs = {settings_of(config, e.method, e.seed, e.weights).name for e in learning}
        return runs | {e.method for e in trials if e.method == "smoothquant"}

    learned = [learned_by(name) for name in units]
    assert (
        len(set().union(*learned)) == sum(map(len, learned)) == 7
    )  # ours x 2 seeds, spinquant x 2 seeds x 2 roundings
    assert all(learned[:6])
    # The run itself where it is what SpinQuant published: one unit has both rows.
    plain = settings_of(config, "spinquant_had", 0, "gptq")
    plain = dataclasses.replace(config, rotation=plain.rotation, quant=plain.quant, optimize=plain.optimize)
    methods = {e.method for group in work_units(plain, plan_trials(plain))["learned"] for e in group}
    assert methods == {"ours", "spinquant_had"}


def test_what_each_method_changes_of_the_run(words):
    config = load_config(
        None,
        [
            *words,
            "quant.a_clip_ratio=0.9",
            "optimize.warmup_steps=1",
            "rotation.init=orthogonal",
            "quantize.sweeps=2",
            "quantize.clip_norm=2",
            "quantize.percdamp=0.02",
        ],
    )
    assert settings_of(config, "ours", 0, "rtn") is config
    other = settings_of(config, "ours", 5, "gptq")
    assert (other.rotation.seed, other.optimize.seed) == (5, 5)
    assert (other.optimize.optimizer, other.quant, other.quantize) == ("cayley_adam", config.quant, config.quantize)
    rounding = dataclasses.replace(config.quantize, cd_passes=0, clip_norm=2.4)
    assert settings_of(config, "gptq", 0, "gptq").quantize == rounding
    for method, online in (("spinquant_had", True), ("spinquant_no_had", False)):
        published = settings_of(config, method, 0, "gptq")
        assert (published.rotation.init, published.rotation.online) == ("hadamard", online)
        assert published.quant.a_clip_ratio == 1
        o, default = published.optimize, OptimizeConfig()
        assert (o.optimizer, o.lr, o.warmup_steps) == (default.optimizer, default.lr, 0)
        assert (o.source, o.steps, o.batch_size, o.w_bits) == (config.optimize.source, 2, 2, 16)
        assert settings_of(config, method, 0, "rtn").optimize == dataclasses.replace(o, w_bits=4)
        assert Path(published.output_dir) == Path(config.output_dir, "tiny", "compare")
        assert published.name.startswith(f"{method}-seed0-")
        longer = dataclasses.replace(config, optimize=dataclasses.replace(config.optimize, steps=3))
        assert (
            settings_of(longer, method, 0, "gptq").name != published.name
        )  # what was learned in 2 steps is not taken for it
    assert settings_of(config, "quarot", 1, "gptq").quant.k_clip_ratio == 0.95
    # A run that already is what SpinQuant published is not learned twice.
    assert published.quantize == rounding
    plain = dataclasses.replace(published, output_dir=config.output_dir, name=config.name)
    assert settings_of(plain, "spinquant_no_had", 0, "gptq") is plain


def measured(said: str) -> int:
    return sum(int(n) for n in re.findall(r"measure .* (\d+) measurements: layer 2/2", said))


@pytest.mark.slow
def test_interrupted_and_resumed_nothing_is_done_twice(capfd, tmp_path, words):
    run = RunDir(tmp_path / "tiny")
    files = run.path / "evaluations"

    watcher = terminate_when(lambda: len(list(files.glob("*.json"))) >= 7)
    capfd.readouterr()
    assert main(["compare", *words]) == 75
    watcher.join()
    first = capfd.readouterr()
    assert "the same command continues" in first.err
    assert first.out == ""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files.glob("*.json")}
    part = rows_of(run.path)
    assert 0 < len(part) <= len(before)

    assert main(["compare", *words]) == 0
    second = capfd.readouterr()
    for path, content in before.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == content
    rows = rows_of(run.path)
    # 2 texts x (full precision + 2 widths x (gptq + 5 systems x 2 seeds)); a row is a measurement, and each was made once.
    assert len(rows) == 2 * (1 + 2 * (1 + 5 * 2))
    assert measured(first.err) + measured(second.err) == len(list(files.glob("*.json"))) == len(rows)
    assert all(row in rows for row in part)
    # Rounded weights serve both widths, and QuaRot's with clips and without: 1 + 4 systems x 2 seeds.
    rounded = re.findall(r"gptq \((\w+)\): layer 2/2", first.err + second.err)
    assert sorted(rounded) == sorted(["none", *["hadamard", "quarot", "learned", "learned"] * 2])
    learned = sorted(p.name.rpartition("-")[0] for p in (run.path / "compare").iterdir())
    assert learned == ["ours-seed1", "spinquant_no_had-seed0", "spinquant_no_had-seed1"]  # layers are gone
    text = comparison_table(rows)
    assert text in second.out
    values = [r["ppl"] for r in rows if r["system"] == "ours" and r["a_bits"] == 4 and "other" in r["dataset"]]
    assert f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} (2)" in text

    # A third start measures nothing; evaluate and compare leave each other's rows alone, and share what they measured.
    assert main(["compare", *words]) == 0
    assert measured(capfd.readouterr().err) == 0
    assert main(["quantize", *words, "quantize.baselines=[none, hadamard]"]) == 0
    before = len(list(files.glob("*.json")))
    capfd.readouterr()
    assert main(["evaluate", *words, "quantize.baselines=[none, hadamard]"]) == 0
    assert len(list(files.glob("*.json"))) == before
    assert rows_of(run.path) == rows
    ours = {(r["rotation"], r["dataset"]): r["ppl"] for r in json.loads((run.path / "results.json").read_text())[-8:]}
    for row in rows:
        system = {"GPTQ": "none", "random Hadamard": "hadamard", "ours": "learned"}.get(row["system"])
        if system and row["a_bits"] == 4 and row["seed"] == 0:
            assert ours[system, row["dataset"]] == row["ppl"]


@pytest.mark.slow
def test_a_row_is_what_the_stages_measure_by_themselves(tmp_path, words):
    """The run's own stages, started apart in another directory, give the same perplexities to the last bit."""
    assert main(["compare", *words, "compare.methods=[gptq, hadamard, ours]", "compare.seeds=[0]"]) == 0
    apart = [*words, "name=apart", "quantize.baselines=[none, hadamard]"]
    for stage in ("optimize", "quantize", "evaluate"):
        assert main([stage, *apart]) == 0
    alone = json.loads((tmp_path / "apart" / "results.json").read_text())
    figures = {(r["rotation"], r["a_bits"], r["dataset"]): r["ppl"] for r in alone}
    rows = [row for row in rows_of(tmp_path / "tiny") if (row["w_bits"], row["a_bits"]) in ((4, 4), (16, 16))]
    assert {row["system"] for row in rows} == {"full precision", "GPTQ", "random Hadamard", "ours"}
    for row in rows:
        assert row["ppl"] == figures[row["rotation"], row["a_bits"], row["dataset"]], row


def test_layers_of_the_run_are_used_and_kept(capfd, tmp_path, words):
    few = [*words, "compare.methods=[gptq, ours]", "compare.seeds=[0]", "quantize.baselines=[none]"]
    assert main(["optimize", *few]) == 0
    assert main(["quantize", *few]) == 0
    run = RunDir(tmp_path / "tiny")
    capfd.readouterr()
    assert main(["compare", *few]) == 0
    assert "gptq (" not in capfd.readouterr().err  # nothing was rounded
    assert len(list(run.layers().glob("*.safetensors"))) == len(list(run.layers("none").glob("*.safetensors"))) == 2
    assert not (run.path / "compare").exists()
    assert [e["event"] for e in read_lines(run.path / "events.jsonl")].count("layer") == 4


def test_layers_that_a_killed_process_left_are_gone_after_the_next_start(capfd, tmp_path, words):
    few = [*words, "compare.methods=[gptq]", "compare.seeds=[0]"]
    assert (
        main(["compare", *few, "compare.keep_layers=true"]) == 0
    )  # what a process leaves that dies once it has measured
    made = list((tmp_path / "tiny" / "compare").iterdir())
    assert made
    capfd.readouterr()
    assert main(["compare", *few]) == 0
    assert measured(capfd.readouterr().err) == 0
    assert not any(path.exists() for path in made)


def test_the_table_shows_mean_spread_and_the_best():
    def row(system: str, ppl: float, seed: int = 0, **changed) -> dict:
        common = {
            "system": system,
            "clips": "none",
            "weights": "rtn",
            "w_bits": 4,
            "a_bits": 4,
            "k_bits": 4,
            "v_bits": 4,
        }
        return common | {"seed": seed, "dataset": "text", "ppl": ppl, "tokens": 60, "seq_len": 20} | changed

    full = {"w_bits": 16, "a_bits": 16, "k_bits": 16, "v_bits": 16, "weights": "none"}
    rows = [row("full precision", 2.0, **full), row("RTN", 11.0), row("QuaRot", 9.0, clips="quarot")]
    rows += [row("QuaRot", 5.0, 1, clips="quarot"), row("QuaRot", 8.0), row("RTN", 4000.4, a_bits=8)]
    lines = comparison_table(rows).splitlines()
    assert lines[0] == "text: perplexity, 60 tokens in windows of 20; full precision 2.000"
    assert [re.split(r" {2,}", line) for line in lines[1:]] == [
        ["method", "weights", "W4A4KV4", "W4A8KV4"],
        ["RTN", "rtn", "11.000", "4000 *"],
        ["QuaRot, clipped", "rtn", "7.000 ± 2.828 (2) *", "-"],
        ["QuaRot", "rtn", "8.000", "-"],
    ]


def test_16_bit_weights_are_measured_apart_from_full_precision(capfd, tmp_path, model):
    words = tiny_run(tmp_path, "name=tiny", "quantize.n_sequences=8", model=model, sequences=60)
    words += ["compare.methods=[rtn]", "compare.bits=[W16A3KV3]", "compare.weights=[rtn]", "compare.seeds=[0]"]
    assert main(["compare", *words]) == 0
    full, rounded = rows_of(tmp_path / "tiny")
    assert (full["system"], rounded["a_bits"]) == ("full precision", 3)
    assert rounded["ppl"] != full["ppl"]
    assert "kl" not in full
    assert rounded["kl_p99"] > rounded["kl"] > 0
    assert "KL divergence from full precision" in capfd.readouterr().out
    for file in (tmp_path / "tiny" / "evaluations").iterdir():
        file.unlink()
    assert main(["compare", *words, "evaluate.fidelity=false"]) == 0
    assert "divergence" not in capfd.readouterr().err
    assert main(["compare", *words]) == 0  # as after an older version
    assert "1 rows were measured before without their divergence from full precision; remove" in capfd.readouterr().err


def test_fidelity_has_tables_of_its_own_where_rows_have_it():
    bits = {"w_bits": 4, "a_bits": 4, "k_bits": 4, "v_bits": 4, "weights": "rtn", "clips": "none"}
    common = bits | {"dataset": "text", "ppl": 5.0, "tokens": 60, "seq_len": 20}
    rows = [common | {"system": "full precision", "seed": 0}, common | {"system": "old", "seed": 0}]
    for seed in range(2):
        rows.append(common | {"system": "RTN", "seed": seed, "kl": 0.5 + seed, "top1": 0.75})
        rows.append(common | {"system": "GPTQ", "seed": seed, "kl": 0.125, "top1": 0.5 + seed / 4})
    _, kl, top1 = (table.splitlines() for table in comparison_table(rows).split("\n\n"))
    assert kl[0] == "text: KL divergence from full precision, nats per token"
    assert [re.split(r" {2,}", line) for line in kl[2:]] == [
        ["RTN", "rtn", "1.00 ± 0.71 (2)"],
        ["GPTQ", "rtn", "0.125 ± 0.000 (2) *"],
    ]
    assert [re.split(r" {2,}", line)[2] for line in top1[2:]] == ["75.00 ± 0.00 (2) *", "62.50 ± 17.68 (2)"]
