"""Exports: what `dist_spin.load` brings back has the bits of the pipeline's own model, and what would be wrong is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from exported import IDS, NO_HAD, R4_BLOCK, W4A4, exported, logits, make_run, pipeline_cell, settings
from safetensors import safe_open
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import dist_spin
from dist_spin.cli import main
from dist_spin.errors import UserError
from dist_spin.storage.quantized_layers import layer_path
from dist_spin.storage.run_directory import RunDir
from dist_spin.storage.tensor_file import load_tensors, save_tensors

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def learned(place) -> tuple[list[str], Path]:
    """A quantised run with R4, and its settings."""
    words = settings(place, "gqa_tied", "name=kept", *R4_BLOCK, "quant.a_symmetric=true")
    return words, make_run(words, "optimize", "quantize")


@pytest.fixture
def run(learned, tmp_path) -> tuple[list[str], Path]:
    """A copy of it to harm."""
    words, path = learned
    shutil.copytree(path, tmp_path / "kept", ignore=shutil.ignore_patterns("export"))
    return [*words, f"output_dir={tmp_path}"], tmp_path / "kept"


@pytest.mark.parametrize("kind", ["gqa_tied", "qwen2", "qwen3", "mistral_window"])
@pytest.mark.parametrize("profile", [NO_HAD, R4_BLOCK], ids=["no-had", "r4-block"])
def test_hf_loads_with_the_bits_of_the_rotated_model(place, kind, profile):
    words = settings(place, kind, f"name={kind}-{profile[0][-4:]}", *profile, "export.shard_gb=0.00003")
    make_run(words, "optimize")
    directory = exported(words, "hf")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    model = dist_spin.load(directory, device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "none")))
    if profile is NO_HAD:  # 16-bit weights that any program takes; only the quantisers are ours
        bare = AutoModelForCausalLM.from_pretrained(directory)
        original = AutoModelForCausalLM.from_pretrained(place / kind)
        torch.testing.assert_close(logits(bare), logits(original), rtol=1e-3, atol=1e-4)
        assert (logits(model) - logits(original)).abs().max() > 0.01


def test_a_bias_of_keys_that_is_kept_apart_comes_back(place):
    """Learned with scales, calibrated with quantisers on, loaded, and generated from a cache that holds keys and biases."""
    words = settings(
        place / "bias", "qwen2", *R4_BLOCK, *W4A4, "quant.k_bias_apart=true", "quant.k_bits=3", dtype="float64"
    )
    words += ["optimize.scales=true", "optimize.steps=2", "quantize.quantize_activations=true"]
    make_run(words, "optimize", "quantize")
    directory = exported(words, "hf")
    model = dist_spin.load(directory, device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "none")))
    assert not torch.equal(logits(model), logits(pipeline_cell([*words, "quant.k_bias_apart=false"], "none")))
    written = [model.generate(IDS[:, :5], max_new_tokens=12, do_sample=False, use_cache=on) for on in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("target", ["hf", "compressed-tensors"])
def test_generation_of_a_loaded_model_does_not_depend_on_the_cache(place, target):
    """In fp64: in fp32 a sum in another order moves a 4-bit code here and there, and that shows in a random model."""
    words = settings(place / "wide", "gqa_tied", *R4_BLOCK, *W4A4, dtype="float64")
    make_run(words, "optimize", "quantize")
    model = dist_spin.load(exported(words, target), device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "none" if target == "hf" else "gptq")))
    written = [model.generate(IDS[:, :5], max_new_tokens=12, do_sample=False, use_cache=on) for on in (True, False)]
    assert written[0].shape == (2, 17)
    assert torch.equal(*written)


def test_hf_of_a_run_with_online_hadamards_leaves_them_out(learned, tmp_path, place):
    words = [*learned[0], "export.profile=no-had"]
    assert main(["export", *words, "--format", "hf", "--output", str(tmp_path / "out")]) == 0
    original = AutoModelForCausalLM.from_pretrained(place / "gqa_tied")
    for model in (
        dist_spin.load(tmp_path / "out", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    ):
        torch.testing.assert_close(logits(model), logits(original), rtol=1e-3, atol=1e-4)
    assert "learned beside R3 and R4, which are left out" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_names_the_base_model_by_its_id_where_one_is_known(learned, place, tmp_path):
    def base(*words: str) -> str:
        assert main(["export", *learned[0], *words, "--format", "hf", "--output", str(tmp_path / str(len(words)))]) == 0
        return (tmp_path / str(len(words)) / "README.md").read_text()

    card = base()
    assert "| Base model | gqa_tied |" in card  # a directory: no link of the hub
    assert "base_model:" not in card
    cached = tmp_path / "models--some--model-1B" / "snapshots" / "0123"  # where the hub's client puts a download
    shutil.copytree(place / "gqa_tied", cached)
    assert "base_model: some/model-1B\n" in base(f"model.path={cached}")


def test_others_refuse_an_hf_checkpoint_that_needs_r4(learned):
    directory = exported(learned[0], "hf")
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # whoever insists on a class
        LlamaForCausalLM.from_pretrained(directory)
    assert "Only `dist_spin.load`" in (directory / "README.md").read_text()


def test_the_export_holds_what_a_reader_needs(learned):
    words, run = learned
    assert main(["evaluate", *words]) == 0
    directory = exported(words, "compressed-tensors")
    ppl = [row["ppl"] for row in json.loads((run / "results.json").read_text())]
    card = (directory / "README.md").read_text()
    assert all(f"{value:.3f}" in card for value in ppl)
    assert all(f"{row['kl']:#.3g}" in card for row in json.loads((run / "results.json").read_text()) if "kl" in row)
    assert "| Perplexity | KL | KL, 99 % | top-1, % | Of |" in card
    assert "gptq on 12 x 20 tokens" in card
    assert card.count("| gptq | ") == card.count(" | this model |") == 1  # the others have 16-bit weights
    assert card.count(" | another model of the run |") == len(ppl) - 1
    assert "    vllm serve PATH OF THIS DIRECTORY" in card
    assert (directory / "dist_spin" / "final.safetensors").read_bytes() == (
        run / "rotations" / "final.safetensors"
    ).read_bytes()
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(directory / file, framework="pt") as stored:
            if name.endswith("layernorm.weight") or name == "model.norm.weight":
                assert stored.get_tensor(name).unique().tolist() == [1.0]
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"} <= index.keys()
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False
    figures = subprocess.run(
        [sys.executable, "-m", "dist_spin", "status", str(run)], capture_output=True, text=True, check=True
    ).stdout
    assert "export    compressed-tensors, r4-block" in figures


def test_a_second_start_finds_the_export_complete(run, capfd):
    words, path = run
    target = exported(words, "hf")
    before = {file: file.stat().st_mtime_ns for file in target.rglob("*")}
    exported(words, "hf")
    assert "is complete" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in target.rglob("*")} == before
    (target / "model-00001-of-00001.safetensors").unlink()
    exported(words, "hf")
    assert (target / "model-00001-of-00001.safetensors").exists()
    exported([*words, "export.profile=no-had"], "hf")  # something else takes its place
    assert not (target / "dist_spin" / "online.safetensors").exists()
    assert sorted(file.name for file in (path / "export").iterdir()) == ["hf"]


def test_a_directory_of_somebody_else_is_left_alone(run, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["export", *run[0], "--format", "hf", "--output", str(tmp_path / "mine")]) == 2
    assert "exists and is no export" in capfd.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def one_line(capfd, words: list[str], target: str) -> str:
    """The one line that an export which must fail says; it changes nothing in the run and leaves nothing behind."""
    run = Path(words[-1].partition("=")[2]) / "kept"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    capfd.readouterr()
    assert main(["export", *words, "--format", target]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-spin:")]
    assert len(said) == 1
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == before
    assert not list(run.glob("export/*")) + list(run.glob("export/.*"))
    return said[0]


def test_truncated_mixed_and_foreign_runs_are_refused(run, capfd, place):
    words, path = run
    first, last = layer_path(RunDir(path).layers(), 0), layer_path(RunDir(path).layers(), 1)
    whole = last.read_bytes()
    last.unlink()
    assert "001.safetensors is missing" in one_line(capfd, words, "compressed-tensors")
    last.write_bytes(whole[: len(whole) // 2])
    assert "001.safetensors cannot be read" in one_line(capfd, words, "compressed-tensors")
    last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "checksum does not match" in one_line(capfd, words, "compressed-tensors")
    last.write_bytes(first.read_bytes())
    assert "is the file 000.safetensors of something else" in one_line(capfd, words, "compressed-tensors")
    last.write_bytes(whole)
    tensors, metadata = load_tensors(last)
    save_tensors(last, tensors, {**metadata, "fingerprint": "of another run"})
    assert "was made from another model" in one_line(capfd, words, "compressed-tensors")
    last.write_bytes(whole)
    assert "was made from another model" in one_line(capfd, ["quant.w_group_size=16", *words], "compressed-tensors")

    settings(place, "mha")  # a model of the same sizes
    other = [word if not word.startswith("model.path=") else f"model.path={place / 'mha'}" for word in words]
    assert "was learned with model weights" in one_line(capfd, other, "hf")
    k_bits = [words[0], "quant.k_bits=8", *words[1:]]
    assert "was learned with quant.k_bits = 4, not 8; set quant.k_bits back" in one_line(capfd, k_bits, "hf")
    (path / "rotations" / "final.safetensors").write_bytes(b"")
    assert "is not a rotation file" in one_line(capfd, words, "hf")


def test_a_quantised_end_is_in_the_export(run, tmp_path):
    words = [*run[0], "quant.embedding_bits=3", "quant.head_bits=8"]
    assert main(["export", *words, "--format", "compressed-tensors"]) == 2
    make_run(words, "quantize")
    model = dist_spin.load(exported(words, "compressed-tensors"), device="cpu")
    assert torch.equal(logits(model), logits(pipeline_cell(words, "gptq")))
    assert all(len(row.unique()) <= 8 for row in model.model.embed_tokens.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
@pytest.mark.distributed
def test_an_interrupted_export_leaves_nothing_under_its_name(place, number):
    words = settings(place, "gqa_tied", "name=long", *NO_HAD, "model.path=" + str(place / "long"))
    if not (place / "long").exists():
        write_model("gqa_tied", place / "long", layers=60, dtype=torch.float32)
        make_run([*words, "optimize.seq_len=4"], "optimize")
    words += ["optimize.seq_len=4", "export.shard_gb=0.000001"]
    target = place / "runs" / "long" / "export" / "hf"
    command = [sys.executable, "-m", "dist_spin", "export", *words, "--format", "hf"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(target.parent.glob(".hf.partial/shard-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), said
    assert not target.exists()
    assert number == signal.SIGKILL or not list(target.parent.iterdir())
    shutil.rmtree(target.parent, ignore_errors=True)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: (d / "dist_spin.json").unlink(), r"has no dist_spin\.json"),
        (lambda d: (d / "dist_spin.json").write_text("{"), "cannot be read"),
        (lambda d: edit(d / "dist_spin.json", '"float32"', '"float16"'), "checksum does not match"),
        (lambda d: (d / "dist_spin" / "online.safetensors").unlink(), "cannot be read"),
        (lambda d: next(d.glob("model-*")).unlink(), "which its index names"),
        (lambda d: next(d.glob("model-*")).write_bytes(b"x" * 5000), "are not those"),
        (lambda d: edit(d / "config.json", "dist_spin_llama", "qwen2"), "is of a qwen2"),
    ],
)
def test_damaged_exports_do_not_load(learned, tmp_path, harm, said):
    shutil.copytree(exported(learned[0], "hf"), tmp_path / "copy")
    harm(tmp_path / "copy")
    with pytest.raises(UserError, match=said):
        dist_spin.load(tmp_path / "copy", device="cpu")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["export.target=hf"], "set rotation.online=false, or export.profile=r4-block"),
        (["export.target=gguf"], "set rotation.online=false"),
        (["export.target=gguf", "rotation.online=true", "export.profile=r4-block"], "use export.profile=no-had"),
        (["export.target=hf", "rotation.online=false", "export.profile=r4-block"], "set rotation.online=true"),
        (
            ["export.target=compressed-tensors", "rotation.online=false"],
            "learn and quantise with quant.a_symmetric=true",
        ),
        (["export.target=compressed-tensors", "export.profile=r4-block"], "set rotation.r4_block=16"),
        (["export.target=compressed-tensors", *NO_HAD, "quant.w_bits=3"], "set quant.w_bits and quant.down_bits so"),
        (
            ["export.target=compressed-tensors", *NO_HAD, "quant.a_symmetric=true", "quant.o_per_head=true"],
            "quant.o_per_head=false",
        ),
        (["export.target=compressed-tensors", *NO_HAD, "quant.a_bits=6"], "set quant.a_bits so, or to 16"),
        (
            ["export.target=compressed-tensors", *NO_HAD, "quant.a_symmetric=true", "quant.a_clip_ratio=0.9"],
            "quant.a_clip_ratio=1.0",
        ),
    ],
)
@pytest.mark.parametrize("stage", ["optimize", "quantize"])
def test_a_run_whose_target_takes_no_such_model_does_not_start(place, tmp_path, words, remedy, stage, capfd):
    words = [*settings(place, "gqa_tied"), *words, f"output_dir={tmp_path}"]
    assert main([stage, *words]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-spin:"))
    assert remedy in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_everything_in_the_way_of_a_target_is_one_answer(place, tmp_path, capfd):
    words = [*settings(place, "gqa_tied"), f"output_dir={tmp_path}", "export.target=compressed-tensors"]
    words += ["rotation.online=true", "quant.w_bits=3", "quant.o_per_head=true", "optimize.clips=true"]
    assert main(["optimize", *words]) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("dist-spin:"))
    assert "5 settings do not fit compressed-tensors: (1) " in line
    for remedy in ("rotation.online=false", "quant.w_bits and", "a_symmetric=true", "o_per_head=false", "clips=false"):
        assert remedy in line


def test_a_run_without_a_target_says_once_what_it_can_become(place, tmp_path, capfd):
    words = [*settings(place, "gqa_tied"), f"output_dir={tmp_path}", *NO_HAD, "quant.a_symmetric=true"]
    make_run([*words, "optimize.steps=0"], "optimize", "quantize")
    said = "the result can be exported as hf, compressed-tensors, gguf; not as executorch ("
    assert capfd.readouterr().err.count(said) == 1
    make_run([*words, "optimize.steps=0", "export.target=hf", "name=other"], "optimize")
    assert "can be exported" not in capfd.readouterr().err


def test_pipelines_and_lm_eval_take_the_model(tmp_path):
    words = settings(tmp_path, "gqa_tied", "name=smol", *NO_HAD)
    make_run(words, "optimize")
    model = dist_spin.load(exported(words, "hf"), device="cpu")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(97)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", eos_token="w2").save_pretrained(
        tmp_path / "gqa_tied"
    )
    directory = exported([*words, "export.shard_gb=1"], "hf")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (said,) = writer("w5 w6 w7", max_new_tokens=4, do_sample=False)
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    (score,) = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(
        [Instance("loglikelihood", {}, ("w5 w6 w7", " w9 w11"), 0)]
    )
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([[5, 6, 7, 9]])).logits[0], -1)
    assert score[0] == pytest.approx(float(log_p[2, 9] + log_p[3, 11]), abs=1e-4)
    assert said["generated_text"].replace(" ", "") == "".join(f"w{i}" for i in ids[0].tolist() if i not in (0, 2))
