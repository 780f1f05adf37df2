"""Fidelity is what a plain computation with the logits of whole models gives, in any chunks and wherever states wait."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dist_spin.cli import main
from dist_spin.data import load_tokens
from dist_spin.evaluate import teacher as teachers
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
    for verb in ("optimize", "quantize", "evaluate"):
        assert main([verb, *words]) == 0
    return words, place / "run"


def rows_of(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["weights"]): row for row in json.loads((run / "results.json").read_text())}


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
