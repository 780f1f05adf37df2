"""Numbers and paths of options that cannot be: refused in one line with exit code 2, before anything is imported or started."""

import re

import pytest

from dist_spin.cli import main

pytestmark = pytest.mark.usefixtures("restored_process")

FAN_OUT = ["quantize", "model.path=m", "--cluster", "local"]
WORDS = [
    *([*FAN_OUT, "--workers", number] for number in ("²", "0", "-1", "1.5", "1e3", "", "1_0", "9" * 5000)),
    *([*FAN_OUT, "--retries", number] for number in ("²", "-1", "many")),
    *(
        ["quantize", "model.path=m", "--layers", part]
        for part in ("3:1", "1:1", "-1:2", "²:3", "1:2:3", ":", "1e9:2e9")
    ),
    *(["generate", "runs/none", "text", "--tokens", number] for number in ("0", "²", "-5", "", "1.0")),
    *(["chat", "runs/none", "--tokens", number] for number in ("0", "-1")),
    *(["bench", "optimize", place] for place in ("/nope", "/dev/null", "/proc/1/mem", "", "a\nb")),
    *(["bench", name, "/nope"] for name in ("quantize", "inference", "pipeline")),
    ["export", "/nope", "--format", "hf"],
    ["export", "model.path=m", "--format", "hf\n"],
    ["status", "\n"],
    ["report", "/dev/zero"],
]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: re.sub(r"\s|9{99,}", "~", " ".join(words))[:60])
def test_an_option_that_cannot_be_is_one_line(words, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"dist-spin: .+\n", captured.err), captured.err
    assert len(captured.err) < 600
    assert not captured.out
