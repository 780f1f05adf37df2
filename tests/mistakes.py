"""The mistakes of docs/mistakes.md: the directory in which they are made, and what the program says of each.

`python tests/mistakes.py` writes the table's other columns anew from its first.
"""

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from tiny import SHAPES, write_letters, write_model

PAGE = Path(__file__).parent.parent / "docs" / "mistakes.md"
QUICKSTART = """
model: {path: model, dtype: float32}
optimize: {source: "tokens:tokens.npy", seq_len: 20, steps: 2, batch_size: 2}
quantize: {source: "tokens:tokens.npy", seq_len: 20, n_sequences: 4}
evaluate: {sources: ["tokens:tokens.npy"], seq_len: 20}
distributed: {device: cpu, threads: 1}
"""


def prepare(here: Path) -> None:
    """Make the files that the commands of the page name in directory `here`."""
    (here / "quickstart.yaml").write_text(f"name: quickstart{QUICKSTART}")
    (here / "tab.yaml").write_text("model:\n\tpath: model\n")
    (here / "twice.yaml").write_text(f"name: a\nname: b{QUICKSTART}")
    np.save(here / "tokens.npy", np.random.default_rng(0).integers(3, 97, (30, 20)))
    (here / "runs" / "quickstart").mkdir(parents=True)
    (here / "runs" / "quickstart" / "config.yaml").write_text(f"name: quickstart{QUICKSTART}")
    write_model("gqa_tied", here / "model")
    write_letters(here / "model")
    for name, change in (
        ("gptq-model", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("phi", {"model_type": "phi", "architectures": ["PhiForCausalLM"]}),
    ):
        SHAPES["mha"].save_pretrained(here / name)
        config = here / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    write_model("gqa_tied", here / "damaged-model")
    weights = load_file(here / "damaged-model" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, here / "damaged-model" / "model.safetensors", {"format": "pt"})
    (here / "R.bin").write_bytes(b"no rotations")


def answer(command: str) -> tuple[int, list[str]]:
    """The exit code of a command line that begins with dist-spin, and its lines without the program's name."""
    from dist_spin.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(shlex.split(command)[1:])
    here = f"{os.getcwd()}/"
    lines = [line.replace(here, "") for line in said.getvalue().splitlines() if line.startswith("dist-spin: ")]
    return code, [line.removeprefix("dist-spin: ") for line in lines]


def rows() -> list[tuple[str, int, list[str]]]:
    """Command, exit code and lines of every row of the page."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `dist-spin"):
            command, code, said = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found.append((_text(command), int(code), [_text(part) for part in said.split("<br>")]))
    return found


def row(command: str, code: int, lines: list[str]) -> str:
    """The row of the page, as `rows` reads it."""
    return f"| {_span(command)} | {code} | {'<br>'.join(map(_span, lines))} |"


def _span(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _text(span: str) -> str:
    span = span.strip()
    inner = span[3:-3] if span.startswith("`` ") else span[1:-1]
    return inner.replace("\\|", "|")


def rewrite() -> None:
    """Write what the program says now into the page."""
    text, page = PAGE.read_text(encoding="utf-8"), PAGE.resolve()
    commands = [_text(re.split(r"(?<!\\)\|", line)[1]) for line in text.splitlines() if line.startswith("| `dist-spin")]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        prepare(Path(place))
        new = {command: row(command, *answer(command)) for command in commands}
        os.chdir(page.parent)
    lines = iter(commands)
    page.write_text(
        "".join(new[next(lines)] + "\n" if line.startswith("| `dist-spin") else line for line in text.splitlines(True)),
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(rewrite())
