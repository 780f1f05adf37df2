"""Bits of single linears and of the two ends: what the files hold, what evaluation reads, what a second start does."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model

from dist_spin.cli import main
from dist_spin.config import load_config
from dist_spin.errors import UserError
from dist_spin.layer_files import layer_path, load_ends, load_layer
from dist_spin.model.architecture import EMBEDDING, HEAD, LAYER_LINEARS
from dist_spin.model.loading import open_model
from dist_spin.numerics.quantizer import dequantize_weight
from dist_spin.rundir import RunDir, load_tensors, save_tensors

DOWN = "mlp.down_proj"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Stages take over signal handlers and torch's threads."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    kept, threads = {number: signal.getsignal(number) for number in numbers}, torch.get_num_threads()
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    place = write_model("gqa_tied", tmp_path_factory.mktemp("model"))
    np.save(place / "tokens.npy", np.random.default_rng(0).integers(3, 97, (60, 20)))
    return place


@pytest.fixture
def words(model, tmp_path) -> list[str]:
    """A short run of everything, with and without rotations; activations at 8 bits leave something to learn."""
    source = f"tokens:{model / 'tokens.npy'}"
    return [
        f"output_dir={tmp_path}",
        f"model.path={model}",
        "model.dtype=float64",
        *(f"{stage}.seq_len=20" for stage in ("optimize", "quantize", "evaluate")),
        *(f"{stage}.source={source}" for stage in ("optimize", "quantize")),
        f"evaluate.sources=[{source}]",
        "optimize.batch_size=2",
        "optimize.steps=1",
        "quantize.n_sequences=24",
        "quantize.baselines=[none]",
        *(f"quant.{which}_bits={bits}" for which, bits in (("a", 8), ("k", 16), ("v", 16))),
        "distributed.device=cpu",
        "distributed.threads=1",
    ]


def rows(run: RunDir) -> dict[str, dict]:
    """Results by rotation, of quantised weights; full precision under "full"."""
    results = json.loads((run.path / "results.json").read_text())
    return {"full" if r["method"] == "full precision" else r["rotation"]: r for r in results}


def stamps(run: RunDir) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in run.path.rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_down_proj_has_its_own_bits(words, tmp_path, method):
    words = [*words, f"quantize.method={method}"]
    for name, more in (("four", []), ("mixed", ["quant.down_bits=8"])):
        assert main(["run", f"name={name}", *words, *more]) == 0
    run, plain = RunDir(tmp_path / "mixed"), RunDir(tmp_path / "four")
    for variant in ("", "none"):
        layer, _ = load_layer(layer_path(run.layers(variant), 0))
        four, _ = load_layer(layer_path(plain.layers(variant), 0))
        assert layer.bits == {role: 8 if role == DOWN else 4 for role in LAYER_LINEARS}
        for role, solution in layer.solutions.items():
            widest = int(solution.codes.abs().max())
            assert 100 < widest <= 128 if role == DOWN else 7 <= widest <= 8, role
            if role != DOWN:  # nothing before down_proj knows of its bits
                torch.testing.assert_close(solution.codes, four.solutions[role].codes, rtol=0, atol=0)
        assert layer.figures[DOWN]["error"] < four.figures[DOWN]["error"] / 50  # 16 times finer: 256 in squares
    assert rows(run)["none"].keys() == rows(plain)["none"].keys()
    full = rows(run)["full"]["ppl"]
    for variant in ("none", "learned"):
        assert abs(rows(run)[variant]["ppl"] / full - 1) < abs(rows(plain)[variant]["ppl"] / full - 1), variant


def test_equal_bits_are_the_same_layers_however_said(words, tmp_path):
    assert main(["run", *words]) == 0
    before = stamps(RunDir(tmp_path / "run"))
    assert main(["quantize", *words, "quant.down_bits=4"]) == 0
    assert stamps(RunDir(tmp_path / "run")) == before


def test_ends_are_rounded_kept_and_measured(words, tmp_path, model, capfd):
    run = RunDir(tmp_path / "run")
    assert main(["run", *words]) == 0
    before, plain = stamps(run), rows(run)
    assert not (run.layers() / "ends.safetensors").exists()
    words = [*words, "quant.embedding_bits=3", "quant.head_bits=8", "quant.w_mse_clip=false"]
    changed = [*words[:-1], "quant.w_mse_clip=true"]
    assert main(["evaluate", *changed]) == 2
    assert "run `dist-spin quantize` first" in capfd.readouterr().err

    assert main(["quantize", *changed]) == 0
    kept = {path: stamp for path, stamp in stamps(run).items() if not path.endswith("ends.safetensors")}
    assert kept == before  # layers do not depend on the ends
    assert main(["evaluate", *changed]) == 0
    for variant in ("none", "learned"):
        assert rows(run)[variant]["ppl"] != plain[variant]["ppl"]  # 3 bits show
    assert rows(run)["full"] == plain["full"]
    done = stamps(run)
    assert main(["quantize", *changed]) == 0
    assert stamps(run) == done

    source = open_model(str(model), revision=None, dtype=torch.float64).weights
    assert main(["quantize", *words]) == 0  # without the clipping search no value lies beyond the codes
    ends, _ = load_ends(run.layers("none") / "ends.safetensors")
    for end, name, highest in (("embedding", EMBEDDING, 3), ("head", HEAD, 127)):
        weight, solution = source.rows(f"{name}.weight"), ends[end]
        assert solution.codes.shape == weight.shape
        assert solution.scale.shape == (len(weight), 1)
        assert int(solution.codes.max()) == highest
        error = (dequantize_weight(*solution, dtype=torch.float64) - weight).abs()
        assert (error <= solution.scale * (0.5 + 1e-9)).all()
        assert error.max() > 0.4 * solution.scale.min()


def test_damaged_ends_are_set_aside_and_made_again(words, tmp_path, capfd):
    words = [*words, "quant.head_bits=8"]
    assert main(["run", *words]) == 0
    path = RunDir(tmp_path / "run").layers("none") / "ends.safetensors"
    whole = path.read_bytes()
    tensors, metadata = load_tensors(path)
    assert list(tensors) == ["head.codes", "head.scale"]
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["quantize", *words]) == 0
    assert "kept as ends.stale, making it again" in capfd.readouterr().err
    assert path.read_bytes() == whole
    save_tensors(path, tensors, {**metadata, "fingerprint": "of another model"})
    assert main(["quantize", *words]) == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["quant.down_bits=16"], "use 2 to 8 bits, or 0 for the same as quant.w_bits"),
        (["quant.head_bits=0"], "use 2 to 8 bits, or 16 = off"),
        (["quant.embedding_bits=9"], "use 2 to 8 bits, or 16 = off"),
        (["quant.w_bits=16", "quant.down_bits=8"], "quant.w_bits=16 leaves all weights as they are, so use 0"),
        (["quant.w_bits=16", "quant.head_bits=8"], "quant.w_bits=16 leaves all weights as they are, so use 16"),
    ],
)
def test_bits_that_cannot_be(settings, remedy):
    with pytest.raises(UserError) as caught:
        load_config(None, ["model.path=x", *settings])
    assert caught.value.remedy == remedy
