"""Small data sets for the harness's tasks, in the columns and file layouts of their hub repositories, from Python's docs."""

import csv
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Item = tuple[str, list[str], int]  # a sentence, candidates for the next one, which of them is right


def sentences() -> list[str]:
    """Plain sentences of the documentation in their order, 5 to 10 words each."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    found = []
    for name in sorted(topics):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(topics[name].split())):
            if re.fullmatch(r"[A-Z][A-Za-z ,'-]+\.", sentence) and 5 <= len(sentence.split()) <= 10:
                found.append(sentence)
    return list(dict.fromkeys(found))


def items(count: int, choices: int, seed: int = 0) -> list[Item]:
    """Which sentence follows? The true one among others, shuffled."""
    text, rng = sentences(), np.random.default_rng(seed)
    out = []
    for i in rng.choice(len(text) - 1, count, replace=False).tolist():
        wrong = [text[j] for j in rng.choice(len(text), choices + 1, replace=False) if j not in (i, i + 1)]
        order = rng.permutation(choices)
        candidates = [text[i + 1], *wrong][:choices]
        out.append((text[i], [candidates[k] for k in order], int(np.flatnonzero(order == 0)[0])))
    return out


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_readme(repository: Path, subsets: dict[str, dict[str, str]]) -> None:
    """The hub's README.md, whose head says which files make which subset and split."""
    lines = ["---", "configs:"]
    for subset, files in subsets.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (repository / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]))


def write_piqa(folder: Path, count: int) -> None:
    rows = [{"goal": a, "sol1": c[0], "sol2": c[1], "label": right} for a, c, right in items(count, 2, 1)]
    for split in ("train", "validation"):
        write_jsonl(folder / f"baber/piqa/{split}.jsonl", rows)


def write_arc(folder: Path, count: int) -> None:
    for seed, (subset, labels) in enumerate({"ARC-Easy": "ABC", "ARC-Challenge": "1234"}.items()):
        rows = [
            {"id": str(i), "question": a, "choices": {"text": c, "label": list(labels)}, "answerKey": labels[right]}
            for i, (a, c, right) in enumerate(items(count, len(labels), seed))
        ]
        for split in ("train", "validation", "test"):
            write_parquet(folder / f"allenai/ai2_arc/{subset}/{split}-00000-of-00001.parquet", rows)


def write_lambada(folder: Path, count: int) -> None:
    rng = np.random.default_rng(5)
    text = [s.removesuffix(".") for s in rng.permutation(sentences())[: 2 * count].tolist()]
    rows = [{"text": f"{a}. {b}"} for a, b in zip(text[::2], text[1::2], strict=True)]
    place = folder / "EleutherAI/lambada_openai"
    for language in ("en", "de"):
        write_jsonl(place / f"data/lambada_test_{language}.jsonl", rows)
    files = {"default": {"test": "data/lambada_test_en.jsonl"}, "de": {"test": "data/lambada_test_de.jsonl"}}
    write_readme(place, files)


def write_the_others(folder: Path, count: int) -> None:
    """boolq, siqa, hellaswag, winogrande and openbookqa."""
    boolq = [
        {"passage": a, "question": c[0].lower(), "idx": i, "label": right} for i, (a, c, right) in E(items(count, 2))
    ]
    siqa = [
        {"context": a, "question": "What comes next?", **dict(zip(("answerA", "answerB", "answerC"), c, strict=True))}
        | {"label": str(right + 1)}
        for a, c, right in items(count, 3)
    ]
    hellaswag = [
        {"ind": i, "activity_label": "Reading", "ctx_a": a, "ctx_b": "then", "ctx": f"{a} then", "endings": c}
        | {"label": str(right)}
        for i, (a, c, right) in E(items(count, 4))
    ]
    winogrande = [
        {
            "sentence": f"{a} In short, _ is meant here.",
            "option1": "it",
            "option2": "the file",
            "answer": str(right + 1),
        }
        for a, _, right in items(count, 2)
    ]
    openbookqa = [
        {"id": str(i), "question_stem": a, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[right]}
        for i, (a, c, right) in E(items(count, 4))
    ]
    for split in ("train", "validation"):
        write_parquet(folder / f"aps/super_glue/boolq/{split}-00000-of-00001.parquet", boolq)
        write_parquet(folder / f"aps/super_glue/copa/{split}-00000-of-00001.parquet", [{"premise": "not this one"}])
        write_csv(folder / f"lighteval/siqa/data/{split}.csv", siqa)
        write_parquet(folder / f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet", hellaswag)
        write_parquet(folder / f"allenai/winogrande/winogrande_xl/{split}-00000-of-00001.parquet", winogrande)
        write_parquet(folder / f"allenai/winogrande/winogrande_xs/{split}-00000-of-00001.parquet", winogrande[:1])
    for split in ("train", "validation", "test"):
        write_parquet(folder / f"allenai/openbookqa/main/{split}-00000-of-00001.parquet", openbookqa)


E = enumerate
