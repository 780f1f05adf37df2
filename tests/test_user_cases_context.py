"""Sequences longer than the model's context, tokens beyond its vocabulary, and decoding with a cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exported import NO_HAD, make_run, settings
from tiny import write_letters
from user_cases import WHOLE_WEIGHTS, case, configure, refusal

import dist_spin
from dist_spin.cli import main
from dist_spin.command import reading_stages
from dist_spin.config.loader import load_config
from dist_spin.errors import UserError
from dist_spin.evaluate.generate import generate
from dist_spin.evaluate.layerwise_model import load_full_model
from dist_spin.model.checkpoint_headers import check_model_path

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("context")
    settings(place, "mha")
    write_letters(place / "mha")
    return place


@pytest.fixture
def short(base, tmp_path) -> list[str]:
    """Settings of a run on a model with a context of 32 tokens."""
    return case(base, tmp_path, lambda directory: configure(directory, max_position_embeddings=32))


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("optimize", "optimize.seq_len"),
        ("quantize", "quantize.seq_len"),
        ("evaluate", "evaluate.seq_len"),
        ("compare", "evaluate.seq_len"),
        ("compare", "quantize.seq_len"),
        ("compare", "optimize.seq_len"),
        ("run", "optimize.seq_len"),
        ("run", "evaluate.seq_len"),
    ],
)
@pytest.mark.parametrize("tokens", [33, 100_000])
def test_a_sequence_longer_than_the_context_is_refused_before_anything_is_computed(
    short, capfd, stage, setting, tokens
):
    more = ["optimize.steps=0"] if stage in ("quantize", "evaluate") else []
    more += WHOLE_WEIGHTS if stage == "evaluate" else []
    line = refusal(capfd, stage, [*short, *more, f"{setting}={tokens}"])
    assert f"{setting}={tokens} is longer than the model's context of 32 tokens" in line
    assert line.endswith(f"; set {setting}=32 or less")


def test_a_sequence_as_long_as_the_context_is_taken(short, base):
    np.save(base / "long.npy", np.random.default_rng(0).integers(3, 97, (30, 32)))
    assert main(["optimize", *short, "optimize.seq_len=32", f"optimize.source=tokens:{base / 'long.npy'}"]) == 0


@pytest.mark.parametrize(
    ("token", "said"), [(97, "holds token id 97, but"), (-1, "holds numbers that are no token ids")]
)
@pytest.mark.parametrize("stage", ["optimize", "quantize", "evaluate"])
def test_a_token_that_the_model_has_no_embedding_for_is_refused(base, tmp_path, capfd, stage, token, said):
    ids = np.full((30, 20), 5)
    ids[:, 3] = token
    np.save(tmp_path / "ids.npy", ids)
    source = f"tokens:{tmp_path / 'ids.npy'}"
    words = [*settings(base, "mha", *NO_HAD), f"output_dir={tmp_path}"]
    words += [f"{stage}.source={source}"] if stage != "evaluate" else [f"evaluate.sources=[{source}]"]
    words += [] if stage == "optimize" else ["optimize.steps=0", *(WHOLE_WEIGHTS if stage == "evaluate" else [])]
    assert said in refusal(capfd, stage, words)


@pytest.fixture(scope="module")
def quantised(base, tmp_path_factory) -> Path:
    """A quantised run on a model of 32 tokens, without a generation_config.json."""
    place = tmp_path_factory.mktemp("quantised")
    words = case(base, place, lambda directory: configure(directory, max_position_embeddings=32))
    (place / "model" / "generation_config.json").unlink()
    return make_run([*words, "optimize.steps=0"], "optimize", "quantize")


@pytest.mark.parametrize(
    ("prompt", "tokens", "said"),
    [
        ("abcd", 28, r"28 tokens after a prompt of 5 .* context of 32; give --tokens 27"),
        ("a" * 40, 1, r"after a prompt of 41 .* context of 32; give a shorter prompt"),
        ("", 33, r"after a prompt of 1 .*; give --tokens 31"),
    ],
)
def test_a_prompt_and_answer_longer_than_the_context_are_refused(quantised, prompt, tokens, said):
    with pytest.raises(UserError, match=said):
        generate(quantised, prompt, tokens)


def lengths_of(model: torch.nn.Module) -> list[int]:
    """Filled with the number of tokens of every forward pass."""
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, ids: lengths.append(ids[0].shape[1]))
    return lengths


def test_a_model_without_generation_config_decodes_with_a_cache(quantised, monkeypatch):
    passes = []
    build = load_full_model

    def built(*arguments):
        model = build(*arguments)
        passes.append(lengths_of(model))
        return model

    monkeypatch.setattr("dist_spin.evaluate.generate.load_full_model", built)
    generate(quantised, "abcde", 4)
    assert all(lengths[0] == 6 and set(lengths[1:]) <= {1} for lengths in passes)
    assert len(passes) == 2
    assert max(map(len, passes)) > 1
    assert main(["export", str(quantised), "--format", "hf"]) == 0
    model = dist_spin.load(quantised / "export" / "hf", device="cpu")
    lengths = lengths_of(model)
    model.generate(torch.tensor([[5, 6, 7, 8, 9, 10]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert lengths == [6, 1, 1, 1]


def test_lengths_that_no_stage_reads_refuse_no_run():
    unread = ["optimize.steps=0", *WHOLE_WEIGHTS, "evaluate.sources=[]", "evaluate.tasks=[boolq]"]
    assert reading_stages(load_config(None, ["model.path=x", *unread])) == []
    assert reading_stages(load_config(None, ["model.path=x"])) == ["optimize", "quantize", "evaluate"]


def test_lengths_are_checked_from_config_json_alone(short, tmp_path):
    check_model_path(str(tmp_path / "model"), lengths={"optimize.seq_len": 32})
    with pytest.raises(UserError, match=r"optimize.seq_len=33 is longer"):
        check_model_path(str(tmp_path / "model"), lengths={"optimize.seq_len": 33})
    configure(tmp_path / "model", max_position_embeddings=None)
    check_model_path(str(tmp_path / "model"), lengths={"optimize.seq_len": 33})
