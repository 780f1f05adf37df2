"""Fidelity is what a plain computation with the logits of whole models gives, in any chunks and wherever states wait."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_run, write_letters
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_spin.cli import main
from dist_spin.data import load_tokens
from dist_spin.errors import UserError
from dist_spin.evaluate import teacher as teachers
from dist_spin.evaluate.continuations import agreement, read_prompts
from dist_spin.model import loss
from dist_spin.model.fidelity import compare_predictions
from dist_spin.model.rotated_weights import Head
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")
FIGURES = ("kl", "kl_p99", "top1")


def plain(p: Tensor, q: Tensor) -> dict[str, float]:
    """The three figures from logits [n, T, vocab] of the original and another model."""
    log_p, log_q = (logits[:, :-1].double().log_softmax(-1) for logits in (p, q))
    divergence = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).flatten()
    at = 0.99 * (len(divergence) - 1)  # between two order statistics
    low, high = divergence.sort().values[[int(at), int(at) + 1]]
    same = (p[:, :-1].argmax(-1) == q[:, :-1].argmax(-1)).double()
    return {
        "kl": divergence.mean().item(),
        "kl_p99": (low + (at % 1) * (high - low)).item(),
        "top1": same.mean().item(),
    }


@pytest.mark.parametrize("at_once", [1, 97 * 7, 1 << 26])
def test_any_chunk_gives_the_plain_figures_and_the_bits_of_the_loss(at_once, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 3, 11, 16, generator=g, dtype=torch.float64)
    weights = torch.randn(2, 97, 16, generator=g, dtype=torch.float64)
    teacher, weights[1] = hidden + 0.2 * teacher, weights[0] + 0.2 * weights[1]
    norms = [nn.RMSNorm(16, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        norms[1].weight.copy_(torch.rand(16, generator=g))
    ids = torch.randint(0, 97, (3, 11), generator=g)
    head, teacher_head = (Head(norm, weight) for norm, weight in zip(norms, weights, strict=True))
    losses, kl, same = compare_predictions(head, hidden, teacher_head, teacher, ids)
    assert torch.equal(losses, head.loss(hidden, ids))
    p, q = teacher_head.logits(teacher)[:, :-1].log_softmax(-1), head.logits(hidden)[:, :-1].log_softmax(-1)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), rtol=1e-10, atol=1e-13)
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))
    assert 0 < same.double().mean() < 1
    _, kl, same = compare_predictions(head, hidden, head, hidden, ids)
    assert not kl.any()
    assert same.all()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list[str], Path]:
    """A run with rounded weights and nothing else quantised, which transformers computes too; measured once."""
    place = tmp_path_factory.mktemp("fidelity")
    words = [*(f"quant.{s}_bits=16" for s in "akv"), "quant.w_bits=3", "quantize.baselines=[none]", "optimize.steps=0"]
    words = tiny_run(place, *words, "evaluate.unquantized_weights=true", sequences=60)
    write_letters(place / "model")
    for verb in ("optimize", "quantize", "evaluate"):
        assert main([verb, *words]) == 0
    return words, place / "run"


def rows_of(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((run / "results.json").read_text())
    return {(row["method"], row["weights"]): row for row in rows if "ppl" in row}


@torch.no_grad()
def test_figures_are_those_of_whole_models(run):
    path = run[1]
    rows = rows_of(path)
    model = path.parent / "model"
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokens = load_tokens(f"tokens:{model / 'tokens.npy'}", "test", 20, None)
    original = reference(tokens).logits
    for index, layer in enumerate(reference.model.layers):
        held, _ = load_layer(layer_path(RunDir(path).layers("none"), index))
        layer.load_state_dict(held.weights(torch.float64, torch.device("cpu")), strict=False)
    expected = plain(original, reference(tokens).logits)
    row = rows["no rotation", "gptq"]
    assert expected["kl"] > 0.01
    assert 0 < expected["top1"] < 1
    # transformers' norms compute in fp32, hence the tolerance.
    assert [row[name] for name in FIGURES] == pytest.approx([expected[name] for name in FIGURES], rel=1e-4)
    # Rotations alone change nothing; full precision is what the others are compared with.
    for method in ("no rotation", "given rotation"):
        assert rows[method, "none"]["kl"] == pytest.approx(0, abs=1e-9)
        assert rows[method, "none"]["top1"] == 1
    assert not rows["full precision", "none"].keys() & set(FIGURES)


@pytest.mark.parametrize("rows_left", ["none", "full precision"])
def test_states_wait_on_disk_and_are_computed_again_where_only_full_precision_is_measured(
    run, tmp_path, monkeypatch, rows_left
):
    words, path = run
    expected = rows_of(path)
    words = [*words, f"output_dir={tmp_path}"]
    for part in ("rotations", "layers", "baselines", "config.yaml", "fingerprint.json"):
        if (path / part).exists():
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / part).symlink_to(path / part)
    if rows_left != "none":
        (tmp_path / "run" / "evaluations").mkdir()
        name = next(file for file in (path / "evaluations").iterdir() if '"full precision"' in file.read_text())
        (tmp_path / "run" / "evaluations" / name.name).write_bytes(name.read_bytes())
    monkeypatch.setattr(teachers, "HOST_SHARE", 0)
    assert main(["evaluate", *words]) == 0
    found = rows_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert [row.get(name) for name in ("ppl", *FIGURES)] == [expected[key].get(name) for name in ("ppl", *FIGURES)]
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith("tmp")]


def test_without_it_perplexities_are_the_same_bits_and_later_rows_say_so(run, tmp_path, capfd):
    words, path = run
    measured, aside = path / "evaluations", tmp_path / "evaluations"
    measured.rename(aside)
    before = rows_of(path)
    try:
        assert main(["evaluate", *words, "evaluate.fidelity=false"]) == 0
        assert "KL" not in capfd.readouterr().out
        without = rows_of(path)
        assert {key: row["ppl"] for key, row in without.items()} == {key: row["ppl"] for key, row in before.items()}
        assert not any(row.keys() & set(FIGURES) for row in without.values())
        assert main(["evaluate", *words]) == 0  # as after an older version
        said = capfd.readouterr()
        assert "4 rows were measured before without their divergence from full precision; remove" in said.err + said.out
        assert rows_of(path) == without
    finally:
        for file in measured.iterdir():
            file.unlink()
        measured.rmdir()
        aside.rename(measured)
    assert main(["evaluate", *words]) == 0
    assert rows_of(path) == before
    assert "KL, 99 %" in capfd.readouterr().out


def test_the_percentile_and_shares_of_known_values():
    from dist_spin.evaluate.fidelity import fidelity_figures

    divergence = torch.arange(101, dtype=torch.float64).view(1, 101)
    figures = fidelity_figures(divergence, (divergence < 25).double())
    assert figures == {"kl": 50.0, "kl_p99": 99.0, "top1": pytest.approx(25 / 101)}
    assert np.isfinite(list(figures.values())).all()


def test_continuations_are_compared_as_transformers_writes_them(run, tmp_path, capfd):
    words, path = run
    prompts = ["The cat", "a b c", "x", "Zebra?", "no more"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(prompts) + "\n")
    words = [*words, f"evaluate.prompts={file}", "evaluate.prompt_tokens=12"]
    assert main(["evaluate", *words]) == 0
    printed = capfd.readouterr().out
    written = json.loads((path / "results.json").read_text())
    rows = {(row["method"], row["weights"]): row for row in written if "prompts" in row}
    assert len(rows) == 4
    model = path.parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    def continued() -> list[list[int]]:
        starts = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
        return [reference.generate(**s, **options)[0, s["input_ids"].shape[1] :].tolist() for s in starts]

    original = continued()
    for index, layer in enumerate(reference.model.layers):
        held, _ = load_layer(layer_path(RunDir(path).layers("none"), index))
        layer.load_state_dict(held.weights(torch.float64, torch.device("cpu")), strict=False)
    expected = torch.tensor([agreement(a, b, 12) for a, b in zip(original, continued(), strict=True)]).mean(0)
    row = rows["no rotation", "gptq"]
    assert [row["greedy_first"], row["greedy_equal"]] == pytest.approx(expected.tolist())
    assert row["greedy_first"] < 12
    assert (row["n"], row["prompts"], row["prompt_tokens"]) == (5, "prompts.txt", 12)
    exact = rows["given rotation", "none"]  # rotations alone change nothing
    assert (exact["greedy_first"], exact["greedy_equal"]) == (12, 1)
    assert f"{row['greedy_first']:.1f} of 12" in printed
    assert main(["evaluate", *words]) == 0
    assert "continue prompts" not in capfd.readouterr().err  # measured before
    assert main(["status", str(path)]) == 0
    assert f"{row['greedy_first']:.1f} of 12 tokens as full precision on prompts.txt" in capfd.readouterr().out
    assert main(["report", str(path)]) == 0
    assert "## Greedy continuations against full precision" in (path / "report.md").read_text()
    assert main(["export", *words, "--format", "hf", "--output", str(tmp_path / "export")]) == 0
    line = f"| 5 of prompts.txt | W3A16K16V16 | no rotation | gptq | {row['greedy_first']:.1f} of 12 | "
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{line}{100 * row['greedy_equal']:.1f} | another model of the run |" in card
    assert "given rotation | none | 12.0 of 12 | 100.0 |" in card
    assert main(["evaluate", *words, "evaluate.prompt_tokens=128"]) == 2  # the model takes 128
    assert "prompt 1 of " in capfd.readouterr().err


def test_agreement_counts_to_the_first_difference_and_the_longer_end():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4], 4) == (2, 0.75)
    assert agreement([1, 2], [1, 2, 3, 4], 8) == (2, 0.5)
    assert agreement([1, 2], [1, 2], 8) == (8, 1.0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b" \n\n", "is empty"),
        ("p.txt", b"\xff\xfe\xff", "cannot be read (it is not UTF-8)"),
        ("p.jsonl", b'"good"\n{"text": 1}\n', "line 2 of .* holds no prompt"),
        ("p.jsonl", b"bare\n", "line 1 of .* holds no prompt"),
        ("", b"", "cannot be read"),
    ],
)
def test_files_without_prompts_are_refused_by_line(tmp_path, name, content, said):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said.replace("(", "[(]").replace(")", "[)]")):
        read_prompts(tmp_path / name)


def test_prompts_are_lines_or_json(tmp_path):
    (tmp_path / "p.txt").write_text('one\n\n {"prompt": "two"}\n')
    assert read_prompts(tmp_path / "p.txt") == ["one", ' {"prompt": "two"}']
    (tmp_path / "p.jsonl").write_text('"one"\n{"prompt": "two\\nlines", "id": 3}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["one", "two\nlines"]
