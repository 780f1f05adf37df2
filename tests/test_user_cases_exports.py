"""Exports give back what the model came with, the same export twice is the same files, and nobody's own files are deleted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from exported import NO_HAD, R4_BLOCK, exported, make_run, settings
from families import LLAMA31_ROPE
from tiny import write_letters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, Qwen2TokenizerFast
from user_cases import configure, refusal

import dist_spin
from dist_spin.cli import main
from dist_spin.export.tokenizer import PROBE, copy_tokenizer
from dist_spin.model.weights import ModelFiles, open_model
from dist_spin.storage.results import update_results
from dist_spin.storage.run_directory import RunDir

pytestmark = pytest.mark.usefixtures("restored_process")

TEXTS = [PROBE, "a <|im_start|> b", "<|im_end|><|im_start|>c", "", "   "]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[list[str], Path]:
    """Settings of a finished run without a tokenizer, and its directory."""
    place = tmp_path_factory.mktemp("exports")
    words = settings(place, "gqa_tied", *NO_HAD)
    return words, make_run(words, "optimize")


@pytest.fixture
def run(base, tmp_path) -> tuple[list[str], Path, Path]:
    """Copies to change: settings, the run's directory and the model's."""
    words, path = base
    model = tmp_path / "model"
    shutil.copytree(path.parents[1] / "gqa_tied", model)
    shutil.copytree(path, tmp_path / "runs" / path.name, ignore=shutil.ignore_patterns("export"))
    return [*words, f"output_dir={tmp_path / 'runs'}", f"model.path={model}"], tmp_path / "runs" / path.name, model


def byte_level_files(directory: Path) -> None:
    """A byte-level tokenizer as vocab.json, merges.txt and added_tokens.json, as Qwen2's used to come."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [PROBE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    core = json.loads(bpe.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(core["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in core["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    content = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    first = len(core["vocab"])
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": first, "<|im_end|>": first + 1}))


def two_templates(directory: Path) -> None:
    write_letters(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = {"default": "{{messages[0]['content']}}", "tool_use": "T{{messages[0]['content']}}"}
    tokenizer.save_pretrained(directory)


def folder_named_tokenizer(directory: Path) -> None:
    write_letters(directory)
    (directory / "tokenizer_backup").mkdir()
    (directory / "tokenizer_backup" / "x").write_text("x")


def without_class(directory: Path) -> None:
    """Nothing but tokenizer.json, so that config.json says which class it is."""
    write_letters(directory)
    (directory / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    "prepare", [byte_level_files, two_templates, folder_named_tokenizer, write_letters, without_class]
)
@pytest.mark.parametrize("profile", [NO_HAD, R4_BLOCK], ids=["no-had", "r4-block"])
def test_an_export_has_the_tokenizer_of_the_model(run, prepare, profile):
    words, _, model = run
    prepare(model)
    original = AutoTokenizer.from_pretrained(model)
    if profile is R4_BLOCK:
        words = [*words, *R4_BLOCK, "name=online"]
        make_run(words, "optimize")
    tokenizer = AutoTokenizer.from_pretrained(exported(words, "hf"))
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [original(text)["input_ids"] for text in TEXTS]
    assert tokenizer.get_added_vocab() == original.get_added_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == (original.eos_token, original.pad_token)


def test_the_added_tokens_are_one_id_each(run):
    words, _, model = run
    byte_level_files(model)
    directory = exported(words, "hf")
    ids = AutoTokenizer.from_pretrained(directory)("a <|im_start|> b")["input_ids"]
    assert len(ids) == len(Qwen2TokenizerFast.from_pretrained(model)("a <|im_start|> b")["input_ids"]) < 8


def test_a_tokenizer_that_files_do_not_give_back_is_written_by_transformers(run, tmp_path):
    _, _, model = run
    write_letters(model)
    files = open_model(str(model))

    class Changed(ModelFiles):
        def tokenizer(self):
            tokenizer = super().tokenizer()
            tokenizer.add_tokens(["<new>"])
            return tokenizer

    (tmp_path / "out").mkdir()
    changed = Changed(files.config, files.weights, files.directory, files.trust_remote_code)
    copy_tokenizer(changed, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text((model / "config.json").read_text())
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_added_vocab()


def test_the_generation_config_comes_along(run):
    words, _, model = run
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True})
    )
    directory = exported(words, "hf")
    loaded = dist_spin.load(directory, device="cpu").generation_config
    assert (loaded.eos_token_id, loaded.temperature) == ([2, 5], 0.6)


def test_position_embeddings_are_told_to_older_readers_too(run):
    words, _, model = run
    configure(model, **LLAMA31_ROPE)
    rope = AutoConfig.from_pretrained(model).rope_parameters
    directory = exported(words, "hf")
    content = json.loads((directory / "config.json").read_text())
    assert content["rope_theta"] == 500000.0
    assert content["rope_scaling"]["rope_type"] == "llama3"
    assert content["rope_scaling"]["factor"] == 8.0
    assert "rope_theta" not in content["rope_scaling"]
    assert content["torch_dtype"] == content["dtype"] == "float32"
    assert AutoConfig.from_pretrained(directory).rope_parameters == rope
    assert dist_spin.load(directory, device="cpu").config.rope_parameters == rope
    del content["rope_parameters"], content["dtype"]  # what a reader of old names sees
    (directory / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(directory).rope_parameters == rope


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


MODEL_ROW = {"method": "m", "rotation": "learned", "weights": "none", "group_size": 0, "seed": 0} | {
    f"{what}_bits": bits for what, bits in {"w": 16, "a": 4, "k": 4, "v": 4}.items()
}


def test_a_run_that_measured_tasks_alone_is_exported(run):
    words, path, model = run
    write_letters(model)
    task = {"task": "boolq", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4}
    update_results(RunDir(path), "evaluate", [MODEL_ROW | task])
    assert "Not measured" in (exported(words, "hf") / "README.md").read_text()


def test_the_same_export_twice_is_the_same_files(run, tmp_path):
    words, path, model = run
    write_letters(model)
    rows = [{**MODEL_ROW, "dataset": "t", "seq_len": 8, "tokens": 64}]
    (path / "results.json").write_text(json.dumps([rows[0] | {"ppl": 7.5, "seconds": 1.25}]))
    first = contents(exported(words, "hf"))
    (path / "results.json").write_text(json.dumps([rows[0] | {"ppl": 7.5, "seconds": 99.0, "stage": "evaluate"}]))
    assert main(["export", *words, "--format", "hf", "--output", str(tmp_path / "again")]) == 0
    assert contents(tmp_path / "again") == first
    (path / "results.json").write_text(json.dumps([rows[0] | {"ppl": 7.25}]))
    assert main(["export", *words, "--format", "hf", "--output", str(tmp_path / "again")]) == 0
    assert "7.250" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("listed", [True, False], ids=["an export of today", "an export without a list"])
def test_files_of_the_users_own_are_never_deleted(run, capfd, listed):
    words, _, model = run
    write_letters(model)
    directory = exported(words, "hf")
    if not listed:
        (directory / "dist_spin" / "files.json").unlink()
    assert main(["export", *words, "export.shard_gb=1", "--format", "hf"]) == 0  # another making: written anew
    if not listed:
        (directory / "dist_spin" / "files.json").unlink()
    for name in ("notes.txt", "merged/weights.bin", "tokenizer_mine/notes.json", "dist_spin/mine/w.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        (directory / name).write_text("mine")
    before = contents(directory)
    line = refusal(capfd, "export", [*words, "--format", "hf"])
    assert "holds dist_spin/mine/w.safetensors and 3 more, which no export wrote; move that away" in line
    assert contents(directory) == before


def occupied_by_a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file"


def under_a_file(place: Path) -> Path:
    return occupied_by_a_file(place) / "out"


def with_files(place: Path) -> Path:
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine")
    return place / "full"


@pytest.mark.parametrize("output", [occupied_by_a_file, under_a_file, with_files, lambda place: Path("/proc/export")])
def test_an_output_that_cannot_be_is_refused(run, tmp_path, capfd, output: Callable[[Path], Path]):
    target = output(tmp_path)
    line = refusal(capfd, "export", [*run[0], "--format", "hf", "--output", str(target)])
    assert str(target) in line
    assert "; " in line


def test_an_empty_directory_may_be_the_output(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["export", *run[0], "--format", "hf", "--output", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "config.json").exists()
