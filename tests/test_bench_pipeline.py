"""`bench pipeline` runs the product's own stages on a random checkpoint, in processes of their own, and says what they took."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from dist_spin.bench.pipeline import drop_cache, shown
from dist_spin.bench.stage_costs import code_bytes, costs, forward_flop, model_bytes
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.model.architecture import Shape
from dist_spin.model.weights import open_model

ROOT = Path(__file__).parent.parent
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.slow
def test_a_tiny_shape_goes_through_the_stages_that_are_asked_for(tmp_path, capfd):
    shape = tmp_path / "tiny"
    shape.mkdir()
    config = json.loads((ROOT / "configs" / "shapes" / "llama-3-8b" / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps(config | SIZES | HEADS))
    words = [f"{stage}.seq_len=16" for stage in ("optimize", "quantize", "evaluate")]
    words += ["optimize.steps=0", "quantize.n_sequences=2", "model.dtype=float32", "distributed.device=cpu"]
    rows, place = tmp_path / "rows.json", tmp_path / "here"
    more = ["--layers", "2", "--stages", "hf,quantize", "--gpus", "1", "--json", str(rows)]
    assert main(["bench", "pipeline", str(shape), "--directory", str(place), *more, *words]) == 0
    printed = capfd.readouterr().out
    measured = json.loads(rows.read_text())
    assert [row["part"] for row in measured] == ["quantize", "hf"]
    for row in measured:
        assert row["seconds"] > row["working_s"] > 0
        assert row["peak_host_bytes"] > 100 << 20
        assert shown(row)[3] in printed
    files = open_model(str(place / "tiny-2"))
    assert files.shape.layers == 2
    stored = sum(path.stat().st_size for path in (place / "tiny-2").glob("*.safetensors"))
    assert measured[1]["read_bytes"] == pytest.approx(stored, rel=0.05)
    exported = place / "runs" / "pipeline" / "export" / "hf" / "config.json"
    assert json.loads(exported.read_text())["num_hidden_layers"] == 2


def test_a_shape_without_a_config_is_refused(tmp_path, capsys):
    assert main(["bench", "pipeline", str(tmp_path), "--directory", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    shape = str(ROOT / "configs" / "shapes" / "llama-3-8b")
    assert main(["bench", "pipeline", shape, "--stages", "learn"]) == 2
    assert "parts are some of optimize, quantize" in capsys.readouterr().err
    assert main(["bench", "pipeline", shape, "name=quickstart"]) == 2
    assert "bench pipeline takes no name=quickstart; give --directory" in capsys.readouterr().err


def test_what_parts_cannot_do_without(tmp_path):
    shape = Shape.of(AutoConfig.from_pretrained(ROOT / "configs" / "shapes" / "llama-3-70b"))
    assert model_bytes(shape) == pytest.approx(141.1e9, rel=0.001)  # 70.55 billion parameters
    assert forward_flop(shape, 2048) == pytest.approx(2 * 68.45e9, rel=0.05)
    config = load_config(None, ["model.path=none", "quant.w_bits=4"])
    assert code_bytes(shape, config) == pytest.approx(68.45e9 / 2, rel=0.001)
    eight = load_config(None, ["model.path=none", "quant.w_bits=8", "quant.w_group_size=128"])
    assert code_bytes(shape, eight) == pytest.approx(68.45e9 * (1 + 4 / 128), rel=0.001)
    fp4 = load_config(None, ["model.path=none", "quant.w_format=nvfp4", "quant.w_bits=4"])
    assert code_bytes(shape, fp4) == pytest.approx(68.45e9 * (1 / 2 + 4 / 16), rel=0.001)
    needed = costs(config, shape, 16384)
    one, four = (needed["optimize"].floor(gpus, 700e12, 50e9) for gpus in (1, 4))
    assert one == pytest.approx(4 * four)
    assert needed["hf"].floor(1, 700e12, 50e9) == pytest.approx(141.1 / 50, rel=0.01)


def test_files_whose_pages_are_dropped_keep_their_content(tmp_path):
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    path.write_bytes(b"kept")
    drop_cache([tmp_path, tmp_path / "nothing"])
    assert path.read_bytes() == b"kept"
