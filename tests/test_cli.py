"""The command line: verbs, exit codes, one line for every mistake, and the whole pipeline on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SHAPES, terminate_when, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_spin.cli import VERBS, main
from dist_spin.config.loader import load_config
from dist_spin.config.run import RunConfig
from dist_spin.errors import EXIT_MEMORY, out_of_memory
from dist_spin.launch import local_pipeline, next_stage
from dist_spin.launch.fanout import NON_RETRYABLE
from dist_spin.model.architecture import LAYER_LINEARS
from dist_spin.storage.checkpoints import checkpoints
from dist_spin.storage.quantized_layers import layer_path, load_layer
from dist_spin.storage.run_directory import LEARNED, RunDir

VARIANTS = ("learned", "none", "hadamard")
RESULT_FIELDS = (
    *("method", "rotation", "weights", "w_bits", "a_bits", "k_bits", "v_bits", "group_size", "seed"),
    *("dataset", "ppl", "tokens", "seconds"),
)

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, whose hidden states are correlated as those of real models are."""
    place = write_model("gqa_tied", tmp_path_factory.mktemp("model"))
    weights = load_file(place / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator, dtype=torch.float64) * torch.linspace(2, 0, 48) ** 3
    correlated = weights["model.embed_tokens.weight"] @ mixing.T
    weights["model.embed_tokens.weight"] = correlated / correlated.norm() * 97**0.5  # also lm_head: a few nats of loss
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    words = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 97)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(place)
    np.save(place / "tokens.npy", np.random.default_rng(0).integers(3, 97, (60, 20)))
    return place


@pytest.fixture
def words(model, tmp_path) -> list[str]:
    source = f"tokens:{model / 'tokens.npy'}"
    return [
        f"output_dir={tmp_path}",
        "name=tiny",
        f"model.path={model}",
        "model.dtype=float32",
        *(f"{stage}.seq_len=20" for stage in ("optimize", "quantize", "evaluate")),
        f"optimize.source={source}",
        f"quantize.source={source}",
        f"evaluate.sources=[{source}]",
        "optimize.batch_size=2",
        "optimize.steps=3",
        "quantize.n_sequences=24",
        "quantize.baselines=[none, hadamard]",
        "distributed.device=cpu",
        "distributed.threads=1",
    ]


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line that a command says before it leaves with `code`."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("dist-spin: ")
    assert "; " in lines[0]  # what is wrong; what to do
    return lines[0]


def test_help_lists_verbs_and_explains_every_setting(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    for verb in ("run", "optimize", "quantize", "evaluate"):
        assert main([verb, "--help-all"]) == 0
        text = capsys.readouterr().out
        for group, settings in vars(load_config(None, ["model.path=x"])).items():
            names = [f"{group}.{name}" for name in vars(settings)] if hasattr(settings, "__dict__") else [group]
            assert all(f"  {name}=" in text for name in names)


def test_mistakes_in_the_command_are_one_line(capsys, tmp_path, words):
    assert "no verb 'optimise'" in mistake(capsys, "optimise")
    assert "model.path" in mistake(capsys, "optimize")
    assert "cannot read" in mistake(capsys, "optimize", str(tmp_path / "none.yaml"))
    assert "did you mean optimize.steps?" in mistake(capsys, "optimize", *words, "optimize.stepps=3")
    assert "optimize.steps is 'many'" in mistake(capsys, "run", *words, "optimize.steps=many")
    assert "optimize.micro_batch_size" in mistake(capsys, "optimize", *words, "optimize.micro_batch_size=3")
    assert "is no run directory" in mistake(capsys, "status", str(tmp_path))
    assert "--jason" in mistake(capsys, "status", str(tmp_path), "--jason")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_used_are_one_line(capsys, tmp_path, words, monkeypatch):
    assert "none.gguf does not exist" in mistake(capsys, "optimize", *words, f"model.path={tmp_path / 'none.gguf'}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "model 'nobody/nothing'" in mistake(capsys, "optimize", *words, "model.path=nobody/nothing")
    assert "no_such_package" in mistake(capsys, "optimize", *words, "model.path=package:no_such_package")
    (tmp_path / "config.json").write_text('{"model_type": "phi", "architectures": ["PhiForCausalLM"]}')
    assert "architecture 'phi' is not supported" in mistake(capsys, "optimize", *words, f"model.path={tmp_path}")
    SHAPES["mha"].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    assert "cannot be read" in mistake(capsys, "optimize", *words, f"model.path={tmp_path}")


def test_settings_that_do_not_fit_the_model_are_one_line(capsys, tmp_path, words, monkeypatch):
    said = mistake(capsys, "optimize", *words, "quant.k_group_size=128")
    assert "quant.k_group_size=128 does not divide this model's head size 12" in said
    other = {"R1": torch.eye(16), "model.layers.0.self_attn.R2": torch.eye(12)}
    torch.save(other, tmp_path / "R.bin")
    assert "R.bin" in mistake(capsys, "optimize", *words, f"rotation.load={tmp_path / 'R.bin'}")
    assert not (tmp_path / "tiny").exists()  # a start that failed leaves no mark: the corrected command works
    monkeypatch.setattr(SHAPES["mha"], "intermediate_size", 188)  # 4 * 47, of which nobody has built a Hadamard matrix
    odd = write_model("mha", tmp_path / "odd")
    said = mistake(capsys, "optimize", *words, f"model.path={odd}")
    assert "188" in said
    assert "rotation.r4_block=" in said
    block = said.partition("rotation.r4_block=")[2].split()[0]
    assert main(["optimize", *words, f"model.path={odd}", "optimize.steps=1", f"rotation.r4_block={block}"]) == 0


def test_text_and_its_lack(capsys, tmp_path, words, model):
    (tmp_path / "short.txt").write_text("w5 w6 w7 w8 w9")
    source = f"text:{tmp_path / 'short.txt'}"
    assert "4 tokens, fewer than one sequence of 20" in mistake(capsys, "optimize", *words, f"optimize.source={source}")
    said = mistake(capsys, "optimize", *words, f"optimize.source=tokens:{tmp_path / 'none.npy'}")
    assert "cannot read" in said
    assert "shorter than seq_len 64" in mistake(capsys, "optimize", *words, "optimize.seq_len=64")
    (tmp_path / "long.txt").write_text(" ".join(f"w{i % 90 + 3}" for i in range(200)))
    longer = f"optimize.source=text:{tmp_path / 'long.txt'}"
    assert main(["optimize", *words, longer, "optimize.steps=1"]) == 0


def test_stages_out_of_order_say_what_comes_first(capsys, words):
    assert "dist-spin optimize" in mistake(capsys, "quantize", *words, "quantize.baselines=[]")
    assert main(["optimize", *words, "optimize.steps=1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", *words, "quantize.baselines=[]"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "dist-spin: layer 0 of 'learned' is not quantised; run `dist-spin quantize` first"


def test_what_torch_says_of_a_full_gpu_becomes_one_line():
    said = "CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 139.80 GiB."
    line = out_of_memory(torch.OutOfMemoryError(said))
    assert line is not None
    assert str(line).startswith("a GPU ran out of memory when 896.00 MiB more were needed; ")
    assert line.exit_code == EXIT_MEMORY
    assert EXIT_MEMORY not in NON_RETRYABLE  # other jobs may have taken it
    assert out_of_memory(RuntimeError(said)) is None


@pytest.mark.gpu
def test_a_gpu_without_room_is_one_line():
    shape = str(Path(__file__).parents[1] / "configs" / "shapes" / "llama-3-8b")
    words = ["optimize.batch_size=512", "optimize.micro_batch_size=512", "optimize.recompute=none"]
    command = [sys.executable, "-m", "dist_spin", "bench", "optimize", shape, "--layers", "2", *words]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)  # which gives the memory back
    assert ended.returncode == EXIT_MEMORY, ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("dist-spin: a GPU ran out of memory when ")
    assert "optimize.micro_batch_size=1" in said


def test_token_ids_beyond_the_vocabulary_are_one_line(capsys, tmp_path, words):
    np.save(tmp_path / "large.npy", np.full((10, 20), 97))
    said = mistake(capsys, "optimize", *words, f"optimize.source=tokens:{tmp_path / 'large.npy'}")
    assert "large.npy holds token id 97, but the model's vocabulary has 97" in said
    assert not (tmp_path / "tiny").exists()  # so that the same name can be used once it is put right


def status(capsys: pytest.CaptureFixture[str], run: Path) -> tuple[dict, str]:
    capsys.readouterr()
    assert main(["status", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(["status", str(run)]) == 0
    return figures, capsys.readouterr().out


def test_status_of_a_run_in_progress_and_continuing_it(capsys, tmp_path, words):
    run = RunDir(tmp_path / "tiny")
    more = [*words, "optimize.steps=60", "optimize.keep_checkpoints=2"]

    watcher = terminate_when(lambda: len(checkpoints(run)) >= 2)
    capsys.readouterr()
    assert main(["optimize", *more]) == 75
    watcher.join()
    assert "the same command continues" in capsys.readouterr().err
    figures, text = status(capsys, run.path)
    step = checkpoints(run)[0][0]
    assert 2 <= step < 60
    learned = figures["optimize"]
    assert (learned["step"], learned["steps"], learned["complete"]) == (step, 60, False)
    assert learned["checkpoints"] == [step, step - 1]
    assert learned["seconds_left"] > 0
    assert {name: layers["finished"] for name, layers in figures["quantize"].items()} == {v: [] for v in VARIANTS}
    assert figures["last_event"]["event"] == "interrupted"
    assert f"step {step} of 60" in text
    assert "left" in text
    assert main(["optimize", *more]) == 0
    assert status(capsys, run.path)[0]["optimize"]["complete"]


def files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run with its time and content, but for the diary and what is written anew at each start."""
    anew = {"events.jsonl", "config.yaml", "metrics.jsonl", "results.json", "report.html", "report.md"}
    found = [p for p in run.rglob("*") if p.is_file() and p.name not in anew]
    return {str(p.relative_to(run)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


@pytest.mark.slow
def test_run_does_everything_once(capfd, tmp_path, words, monkeypatch):
    run = RunDir(tmp_path / "tiny")
    words = [*words, "export.target=hf", "export.profile=r4-block"]
    # Every stage but the first is started while the one before it is at work, and waits.
    monkeypatch.setattr(next_stage, "AFTER_S", 0.0)
    monkeypatch.setattr(next_stage, "PROCESS_BYTES", 0)
    started, start_ranks = [], local_pipeline.start_ranks

    def noting(command, nproc, turn):
        started.append((command[3], turn is not None))
        return start_ranks(command, nproc, turn)

    monkeypatch.setattr(local_pipeline, "start_ranks", noting)
    assert main(["run", *words]) == 0
    stages = ("optimize", "quantize", "evaluate", "report", "export")
    assert started == [(stage, stage != "optimize") for stage in stages]
    table = capfd.readouterr().out
    results = json.loads((run.path / "results.json").read_text())
    assert [(r["method"], r["rotation"], r["weights"], r["w_bits"], r["a_bits"]) for r in results] == [
        ("full precision", "none", "none", 16, 16),
        ("no rotation", "none", "gptq", 4, 4),
        ("random Hadamard", "hadamard", "gptq", 4, 4),
        ("learned rotation", "learned", "gptq", 4, 4),
    ]
    for row in results:
        assert set(RESULT_FIELDS) <= row.keys()
        assert (row["k_bits"], row["v_bits"]) == (row["a_bits"], row["a_bits"])
        assert (row["group_size"], row["seed"], row["tokens"]) == (0, 0, 12 * 20)
        assert 1 < row["ppl"] < 1000
        assert f"{row['ppl']:.3f}" in table
        assert row["method"] in table
    for variant in (LEARNED, "none", "hadamard"):
        for index in range(2):
            layer, _ = load_layer(layer_path(run.layers(variant), index))
            assert layer.figures.keys() == set(LAYER_LINEARS)
            for role, figures in layer.figures.items():
                assert 0 < figures["error"] < figures["rtn_error"], (variant, index, role)
    figures, text = status(capfd, run.path)
    assert {name: layers["finished"] for name, layers in figures["quantize"].items()} == {v: [0, 1] for v in VARIANTS}
    assert figures["results"] == results
    assert "complete" in text
    assert "report.html" in text
    assert "Not there yet" not in (run.path / "report.md").read_text()
    assert "result    learned rotation, gptq weights" in text
    config = load_config(str(run.path / "config.yaml"), [])
    assert isinstance(config, RunConfig)
    assert config.optimize.steps == 3

    before, seconds = files(run.path), [row["seconds"] for row in results]
    assert f"{run.export / 'hf' / 'config.json'}" in {str(run.path / name) for name in before}
    for stage in stages:
        assert main([stage, *words]) == 0
    assert files(run.path) == before
    assert [row["seconds"] for row in json.loads((run.path / "results.json").read_text())] == seconds
    # One lost layer is done again, and only that one.
    lost = layer_path(run.layers(), 1)
    lost.unlink()
    assert main(["quantize", *words]) == 0
    after = files(run.path)
    name = str(lost.relative_to(run.path))
    assert {k for k in after if after[k] != before.get(k)} == {name}
    assert after[name][1] == before[name][1]
