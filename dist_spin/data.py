"""Token streams: every batch is a pure function of (source, seed, step), so that a resumed run sees the same data.

Sources (`dist_spin.config.check_source`):
    pydoc                       Python's own documentation (`pydoc_data.topics`); in every CPython, differs by version
    wikitext2                   WikiText-2 raw
    c4                          the start of one shard of C4 (English), streamed
    hf:NAME[:CONFIG][:COLUMN]   a Hugging Face data set, by hub id or local directory; COLUMN is "text" unless given
    text:PATH[,PATH…]           UTF-8 files, joined by blank lines
    tokens:PATH.npy             integers [rows, length], tokenised already; each row is one sequence

(`self`, the model's own text, is no source that is read: see `dist_spin.pipeline.self_generated_text`.)

Splits: wikitext2, c4 and hf: have their own. The local sources (pydoc, text:, tokens:) are cut in two: `train` is the
first 80 % of the tokens (tokens: rows), `test` the rest, so the two never share a token. Split `all`, or `#all` behind
a path (`text:wiki.test.raw#all`), takes everything: meant for files that are a split already.

No special tokens (BOS, EOS) are added anywhere: spinquant evaluates that way.
"""

import hashlib
import importlib
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import torch
from torch import Tensor

from dist_spin.config.checks import check_source
from dist_spin.errors import UserError
from dist_spin.runtime.progress import long_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_ORDER = -1  # seed of `batch_indices`: no shuffling
HUB_TIMEOUT = 5.0  # seconds to find out whether the hub can be reached
HF_CHARACTERS = 20_000_000  # of an hf: source, from its start (about 5 million tokens): some data sets never end
LOCAL_COPY = "give a local copy: text:PATH#all or tokens:PATH.npy#all"


def load_tokens(source: str, split: str, seq_len: int, tokenizer: "PreTrainedTokenizerBase | None") -> Tensor:
    """The source as consecutive sequences that do not overlap; what is left at the end is dropped.

    `wikitext2` `train` is tokenised line by line, as published for rotation learning; everything else as one text with
    blank lines between documents, as published for calibration and evaluation. A `tokens:` row longer than `seq_len`
    is cut after it.

    Args:
        tokenizer: of the model; None will do for `tokens:` sources.

    Returns:
        int64 [n_sequences, seq_len], n_sequences ≥ 1, on the CPU.

    Raises:
        UserError: the source cannot be read, or is shorter than one sequence.
    """
    check_source("source", source)
    if source.startswith("tokens:"):
        return torch.from_numpy(_rows(source, split, seq_len)[:, :seq_len].astype(np.int64))
    with long_step(f"read and tokenise {source}"):
        stream = _stream(source, split, tokenizer, by_line=(source, split) == ("wikitext2", "train"))
    n_sequences = _at_least_one(len(stream), seq_len, source, split)
    return stream[: n_sequences * seq_len].view(n_sequences, seq_len)


def calibration_windows(
    source: str, split: str, n: int, seq_len: int, seed: int, tokenizer: "PreTrainedTokenizerBase | None"
) -> Tensor:
    """`n` windows of the text at random places, which may overlap, as GPTQ calibrates; of `tokens:`, `n` random rows.

    Returns:
        int64 [n, seq_len] on the CPU, the same for the same arguments.

    Raises:
        UserError: the source cannot be read, is shorter than one window, or has fewer than `n` rows.
    """
    check_source("source", source)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if source.startswith("tokens:"):
        rows = _rows(source, split, seq_len)
        if len(rows) < n:
            raise UserError(f"{source} ({split}) has {len(rows)} rows, {n} are wanted", "set n_sequences to fewer")
        indices = torch.randperm(len(rows), generator=generator)[:n]
        return torch.from_numpy(rows[indices.numpy(), :seq_len].astype(np.int64))
    with long_step(f"read and tokenise {source}"):
        stream = _stream(source, split, tokenizer, by_line=False)
    _at_least_one(len(stream), seq_len, source, split)
    starts = torch.randint(len(stream) - seq_len + 1, (n,), generator=generator)
    return stream[starts[:, None] + torch.arange(seq_len)]  # [n, seq_len]


def batch_indices(step: int, batch_size: int, n_blocks: int, seed: int) -> list[int]:
    """Which sequences the whole job takes at `step` (from 0): epochs follow one another without a gap.

    Every epoch is a permutation of all `n_blocks` sequences of its own. `seed` = -1 keeps them in order instead, as
    published: step s takes sequences s·batch_size + 0, 1, ….
    """
    first = step * batch_size
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(first + len(indices), n_blocks)
        order = np.arange(n_blocks) if seed == IN_ORDER else np.random.default_rng((seed, epoch)).permutation(n_blocks)
        indices += order[offset : offset + batch_size - len(indices)].tolist()
    return indices


def rank_share(indices: list[int], rank: int, world: int) -> list[int]:
    """The part of a batch that one of `world` ranks takes: every world-th, so shares differ by at most one."""
    return indices[rank::world]


def tokens_fingerprint(tokens: Tensor) -> str:
    """SHA-256 (hex) of shape, dtype and values: equal exactly for equal data, wherever it came from."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)} {tokens.dtype} ".encode())
    digest.update(tokens.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _at_least_one(n_tokens: int, seq_len: int, source: str, split: str) -> int:
    """How many whole sequences there are."""
    if n_tokens < seq_len:
        remedy = f"set seq_len to at most {n_tokens} or give more text" if n_tokens else "give more text"
        raise UserError(f"{source} ({split}) has {n_tokens} tokens, fewer than one sequence of {seq_len}", remedy)
    return n_tokens // seq_len


def _stream(source: str, split: str, tokenizer: "PreTrainedTokenizerBase | None", *, by_line: bool) -> Tensor:
    """Token ids of one split, int64 [n_tokens]."""
    if tokenizer is None:
        raise UserError(f"{source} is text and the model has no tokenizer", "give a tokens:PATH.npy source instead")
    if source == "pydoc" or source.startswith("text:"):
        name, split = _local(source, split)
        ids = _tokenise([_pydoc() if name == "pydoc" else _files(name.removeprefix("text:"))], tokenizer)
        return ids[_part(len(ids), source, split)]
    documents, separator = _hub_documents(source, split)
    return _tokenise(documents if by_line else [separator.join(documents)], tokenizer)


def _tokenise(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Ids of `texts` one after another, int64 [n_tokens], without special tokens.

    A text is never cut into pieces for speed: tokenizers treat its start and the spaces around a cut differently.
    `verbose=False` because a text longer than the model's context is just what is wanted.
    """
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([token for text in ids for token in text], dtype=torch.int64)


def _local(source: str, split: str) -> tuple[str, str]:
    """Source without `#all`, and the split that is meant."""
    name = source.removesuffix("#all")
    return name, split if name == source else "all"


def _part(n: int, source: str, split: str) -> slice:
    """The tokens or rows of one split of a local source that has `n`."""
    cut = n * 4 // 5
    parts = {"train": slice(0, cut), "test": slice(cut, n), "all": slice(0, n)}
    if split not in parts:
        raise UserError(f"{source} has no split {split!r}", "use train (first 80 %), test (the rest) or all")
    return parts[split]


def _pydoc() -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _files(paths: str) -> str:
    texts = []
    for path in paths.split(","):
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", "give text:PATH of a UTF-8 file") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start})", "convert it to UTF-8") from error
    return "\n\n".join(texts)


def _rows(source: str, split: str, seq_len: int) -> np.ndarray[Any, Any]:
    """Rows of one split of a `tokens:` file, integers [n_rows ≥ 1, length ≥ seq_len], left on disk until they are used."""
    name, split = _local(source, split)
    path = name.removeprefix("tokens:")
    array = token_rows(path)
    rows = array[_part(len(array), source, split)]
    if array.shape[1] < seq_len:
        remedy = f"set seq_len to at most {array.shape[1]}"
        raise UserError(f"{path} has rows of {array.shape[1]} tokens, shorter than seq_len {seq_len}", remedy)
    if len(rows) == 0:
        raise UserError(f"{source} has no row in split {split} ({len(array)} in all)", "add #all to take every row")
    if rows.min() < 0 or rows.max() > np.iinfo(np.int64).max:
        raise UserError(f"{path} holds numbers that are no token ids", "save ids from 0 to the vocabulary size")
    return rows


def token_rows(path: str) -> np.ndarray[Any, Any]:
    """All rows of a .npy file of tokens, integers [rows, length], left on disk until they are used.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "give tokens:PATH.npy") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no plain .npy array", "write it with numpy.save, without objects") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        content = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path} holds {content}", "save integers of shape [rows, length], one sequence per row")
    return array


@dataclass(frozen=True)
class _HubText:
    """Where the documents of a Hugging Face source are, and how they are put together."""

    name: str
    config: str | None
    split: str
    column: str = "text"
    files: dict[str, str] | None = None  # data files to read instead of all
    n_documents: int | None = None  # read from the start, streamed; None: all, kept in the local cache
    separator: str = "\n\n"


def _hub_text(source: str, split: str) -> _HubText:
    if source == "wikitext2":
        return _HubText("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    if source == "c4":
        split = "validation" if split == "test" else split  # c4 has no test split
        # 1100 documents joined by spaces are what GPTQ and its successors report as C4; 4000 give enough to learn from.
        shards = {"train": ("00000-of-01024", 4000), "validation": ("00000-of-00008", 1100)}
        if split not in shards:
            raise UserError(f"c4 has no split {split!r}", "use train, validation or test (the same as validation)")
        shard, n_documents = shards[split]
        files = {split: f"en/c4-{split}.{shard}.json.gz"}
        return _HubText("allenai/c4", None, split, files=files, n_documents=n_documents, separator=" ")
    parts = source.removeprefix("hf:").split(":")
    if len(parts) > 3:
        raise UserError(f"{source} has too many parts", "write hf:NAME[:CONFIG][:COLUMN]")
    name, config, column = (*parts, "", "")[:3]
    return _HubText(name, config or None, split, column or "text")


def _hub_documents(source: str, split: str) -> tuple[list[str], str]:
    """Documents in order, and what stands between two of them."""
    wanted = _hub_text(source, split)
    require_hub(wanted.name, source, LOCAL_COPY)
    import datasets  # type: ignore[import-untyped]  # late: slow to import, and local sources do without it

    documents: list[str] = []
    left = HF_CHARACTERS if source.startswith("hf:") else sys.maxsize
    try:
        rows = datasets.load_dataset(
            wanted.name,
            wanted.config,
            split=wanted.split,
            data_files=wanted.files,
            streaming=wanted.n_documents is not None,
        )
        for row in islice(rows, wanted.n_documents):
            if not isinstance(row.get(wanted.column), str):
                remedy = f"name one of {', '.join(row)} that holds text: hf:NAME:CONFIG:COLUMN"
                raise UserError(f"{source} has no text in a column {wanted.column!r}", remedy)
            documents.append(row[wanted.column])
            left -= len(row[wanted.column])
            if left < 0:
                break
    except UserError:
        raise
    except Exception as error:  # whatever the library, the network or a file format throws is the user's to put right
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {source} ({split}): {reason}", LOCAL_COPY) from error
    return documents, wanted.separator


def require_hub(name: str, wanted_for: str, instead: str) -> None:
    """Fail within seconds where there is no network; `datasets` itself would retry for half a minute.

    Args:
        name: data set on the hub. wanted_for: what is read from it. instead: what to do without the hub.

    Raises:
        UserError: the hub cannot be reached.
    """
    if os.path.isdir(name) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # offline, `datasets` goes straight to its cache
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except huggingface_hub.errors.HfHubHTTPError:
        return  # the hub answers; `datasets` says best what is wrong with this name
    except Exception as error:  # the class depends on the HTTP library inside huggingface_hub
        remedy = f"set HF_HUB_OFFLINE=1 if it was downloaded before; else {instead}"
        raise UserError(f"cannot reach the Hugging Face hub for {wanted_for}", remedy) from error
