"""Both models of a run answer: the full-precision one as transformers itself does, the quantised one beside it."""

import io

import pytest
import torch
from tiny import tiny_run, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dist_spin.cli import main

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture
def run(tmp_path):
    model = write_model("gqa_tied", tmp_path / "model")
    words = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 97)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w90 ' if m.role == 'user' else 'w91 ' }}{{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(model)
    sizes = ("model.dtype=float32", "optimize.batch_size=1", "quantize.n_sequences=4")
    settings = tiny_run(tmp_path, *sizes, sequences=40)
    assert main(["optimize", *settings]) == 0
    return tmp_path / "run", settings


def reference(path, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own unquantised model continues a prompt with."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([prompt])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=2
    )
    return whole[0, len(prompt) :].tolist()


def said(text: str) -> list[list[str]]:
    """The answers in what was printed."""
    return [part.split() for part in text.split("--- ")[1:]]


def test_generate_and_chat(capsys, monkeypatch, tmp_path, run):
    directory, settings = run
    capsys.readouterr()
    assert main(["generate", str(directory), "w5 w6"]) == 2
    assert capsys.readouterr().err.count("not quantised; run `dist-spin quantize` first") == 1
    assert main(["quantize", *settings]) == 0
    directory = directory.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["generate", str(directory), "w5 w6 w7", "--tokens", "8"]) == 0
    full, quantised = said(capsys.readouterr().out)
    assert full[:2] == ["full", "precision"]
    assert full[2:] == [f"w{i}" for i in reference(tmp_path / "model", [5, 6, 7], 8) if i]
    assert " ".join(quantised).startswith("learned rotation, W4A4KV4, weights by gptq w")

    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6\nw7\n\n"))
    assert main(["chat", str(directory), "--tokens", "4"]) == 0
    answers = said(capsys.readouterr().out)
    assert [answer[0] for answer in answers] == ["full", "learned", "full", "learned"]
    first = reference(tmp_path / "model", [90, 5, 6], 4)
    assert answers[0][2:] == [f"w{i}" for i in first if i]
    # Its own first answer is part of what the second question is answered from.
    second = reference(tmp_path / "model", [90, 5, 6, 91, *first, 90, 7], 4)
    assert answers[2][2:] == [f"w{i}" for i in second if i]


def test_mistakes_are_one_line(capsys, tmp_path):
    for words in (["generate", str(tmp_path), "x"], ["chat", str(tmp_path)], ["generate", str(tmp_path)], ["chat"]):
        assert main(words) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
