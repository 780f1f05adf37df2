"""Settings that no run can have: each is refused at once, in one line with a remedy, whoever wrote them and however."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_spin.cli import main
from dist_spin.config.loader import RENAMED, dump_config, load_config
from dist_spin.config.yaml_text import MAX_BYTES, MAX_DEPTH
from dist_spin.errors import UserError
from dist_spin.numerics.gptq import MAX_DAMPING
from dist_spin.pipeline.fingerprints import gptq_options

MODEL = "model.path=some/model"


def error_of(path: Path | str | None, *overrides: str) -> UserError:
    """The error, once it is sure that a user reads one short line of it, and soon."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_config(None if path is None else str(path), overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    assert caught.value.remedy, str(caught.value)
    assert time.monotonic() - began < 5
    return caught.value


# Old names.


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
@pytest.mark.parametrize("from_file", [True, False])
def test_a_setting_loads_by_its_old_name_with_one_warning(old, new, from_file, tmp_path, caplog):
    path = tmp_path / "run.yaml"
    path.write_text(f"{old.replace('.', ': {')}: 3}}\n")
    config = load_config(str(path), [MODEL]) if from_file else load_config(None, [MODEL, f"{old}=3"])
    group, _, leaf = new.partition(".")
    assert getattr(getattr(config, group), leaf) == 3
    where = path if from_file else "the command line"
    assert caplog.messages == [f"{old} is now called {new} (in {where})"]
    assert f"  {leaf}: 3\n" in dump_config(config)
    assert old.partition(".")[2] not in dump_config(config)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_old_and_the_new_name_together_are_refused(old, new, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{old}: 3\n{new}: 3\n")
    wanted = f"{old} and {new} are both set in {path}, but are one setting; keep {new} alone"
    assert str(error_of(path, MODEL)) == wanted
    for words in ([f"{old}=3", f"{new}=3"], [f"{new}=3", f"{old}=3"]):
        assert str(error_of(None, MODEL, *words)) == wanted.replace(str(path), "the command line")
    path.write_text(f"{old}: 3\n")  # a file from before, and a word of today that changes it
    group, _, leaf = new.partition(".")
    assert getattr(getattr(load_config(str(path), [MODEL, f"{new}=4"]), group), leaf) == 4


# Numbers.


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("rotation.seed", 2**63 - 1),
        ("rotation.r4_block", 2**20),
        ("quant.w_group_size", 2**20),
        ("optimize.seed", 2**63 - 1),
        ("optimize.steps", 2**31 - 1),
        ("optimize.batch_size", 65536),
        ("optimize.seq_len", 2**24),
        ("optimize.reproject_every", 2**31 - 1),
        ("quantize.seed", 2**63 - 1),
        ("quantize.n_sequences", 2**20),  # of 2048 tokens
        ("quantize.block_size", 2**20),
        ("evaluate.max_sequences", 2**31 - 1),
        ("methods.qat_batch_size", 65536),
        ("compare.spread_seeds", 100_000),
        ("report.sequences", 2**31 - 1),
        ("distributed.nproc", 1024),
        ("distributed.threads", 1024),
        ("distributed.timeout_s", 2_592_000),
    ],
)
def test_whole_numbers_have_an_upper_limit_that_the_message_gives(key, most):
    group, _, leaf = key.partition(".")
    assert getattr(getattr(load_config(None, [MODEL, f"{key}={most}"]), group), leaf) == most
    for above in (most + 1, 2**64, 10**30):
        error = error_of(None, MODEL, f"{key}={above}")
        assert error.problem.startswith(f"{key} is {str(above)[:20]}")
        assert error.remedy == f"use at most {most}"
    assert (
        error_of(None, MODEL, f"{key}={'9' * 5000}").remedy == "it takes a whole number"
    )  # more digits than Python reads


@pytest.mark.parametrize(
    "key",
    [
        *("optimize.lr", "optimize.scale_lr", "optimize.clip_lr", "optimize.max_grad_norm"),
        *("methods.flat_lr", "methods.dart_lr", "methods.qat_lr", "export.shard_gb"),
    ],
)
def test_fractions_stay_within_fp32(key):
    for above in ("1e308", "3.5e38", "1e400", "9" * 5000):
        error = error_of(None, MODEL, f"{key}={above}")
        assert error.problem.startswith(f"{key} is ")
        assert error.remedy == "use at most 3.403e+38"
    assert error_of(None, MODEL, f"{key}=.nan").remedy == "it takes a number"
    load_config(None, [MODEL, f"{key}=3.4e38"])


def test_damping_is_what_the_solver_takes():
    error = error_of(None, MODEL, "quantize.percdamp=10.01")
    assert (error.problem, error.remedy) == ("quantize.percdamp is 10.01", f"use at most {MAX_DAMPING:g}")
    assert gptq_options(load_config(None, [MODEL, "quantize.percdamp=10"])).percdamp == MAX_DAMPING
    assert error_of(None, MODEL, "quantize.clip_norm=101").remedy == "use at most 100"


@pytest.mark.parametrize("key", ["optimize.lr", "quantize.percdamp", "quant.a_clip_ratio", "export.shard_gb"])
def test_what_fp32_rounds_to_zero_is_not_above_zero(key):
    for small in ("1e-300", "1e-46"):
        assert "above 0" in error_of(None, MODEL, f"{key}={small}").remedy


def test_the_tokens_of_a_step_or_of_a_calibration_are_bounded_together():
    assert error_of(None, MODEL, "optimize.seq_len=1048576", "optimize.batch_size=2049").remedy == "use at most 2048"
    assert error_of(None, MODEL, "quantize.seq_len=16777216", "quantize.n_sequences=129").remedy == "use at most 128"
    own = (MODEL, "optimize.source=self", "optimize.batch_size=1024")
    assert error_of(None, *own, "optimize.steps=1025").remedy == "the model writes text for at most 1024 steps"
    load_config(None, [*own, "optimize.steps=1024"])


# Texts.


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a" * 201, "use at most 200 bytes"),
        ("é" * 101, "use at most 200 bytes"),
        ("a\nb", "without control characters or line breaks"),
        ("a\x00b", "without control characters"),
        ("a\x1b[31mb", "without control characters"),
        ("a\u2028b", "without control characters or line breaks"),
        ("a\udcffb", "write it in UTF-8"),
        ("-rf", "begin it with another character"),
        ("", "use a plain directory name"),
    ],
)
def test_names_that_make_no_directory(name, remedy):
    error = error_of(None, MODEL, f"name={name}")
    assert error.problem.startswith("name is ")
    assert remedy in error.remedy


def test_names_that_do(tmp_path):
    for name in ("a" * 200, "é" * 100, "a b", "{x}", "名前", "a-", ".hidden", "1e-4"):
        assert load_config(None, [MODEL, f"name={name}"]).name == name


@pytest.mark.parametrize(
    "key",
    [
        *("output_dir", "model.path", "model.revision", "rotation.load", "evaluate.tasks_dir", "export.gguf_converter"),
        *("distributed.offload_dir", "optimize.split", "quantize.split", "evaluate.split"),
    ],
)
def test_paths_and_words_have_no_control_characters(key):
    for text in ("a\x00b", "a\nb", "a\rb", "a\x85b", "a\udcffb"):
        assert error_of(None, MODEL, f"{key}={text}").problem == f"{key} is {text!r}"
    for text in ("a b", "a'b", "Ü/ß", "$HOME"):
        load_config(None, [MODEL, f"{key}={text}"])


@pytest.mark.parametrize("key", ["optimize.source", "quantize.source"])
def test_sources_have_no_control_characters(key):
    assert error_of(None, MODEL, f"{key}=text:a\nb").problem == f"{key} is 'text:a\\nb'"
    assert "evaluate.sources" in error_of(None, MODEL, 'evaluate.sources=["text:a\\0b"]').problem
    assert "compare.methods" in error_of(None, MODEL, 'compare.methods=["a\\nb"]').problem


@pytest.mark.parametrize("key", ["output_dir", "model.path", "rotation.load", "evaluate.tasks_dir"])
def test_paths_are_as_long_as_file_systems_take(key):
    load_config(None, [MODEL, f"{key}={'a' * 255}"])
    for path in ("a" * 256, "a/" * 2048, "é" * 128):
        assert "use a shorter path" in error_of(None, MODEL, f"{key}={path}").remedy


# Files.

DEEP = "optimize: " + "[" * 3000 + "]" * 3000
BLOCKS = "".join(" " * i + "a:\n" for i in range(300))
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = "name: &a " + "x" * 1000 + "\nb: [" + ", ".join(["*a"] * 200) + "]\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (DEEP, f"line 1: nested deeper than {MAX_DEPTH} levels"),
        (BLOCKS, f"line {MAX_DEPTH}: nested deeper than {MAX_DEPTH} levels"),
        (BOMB, "line 2: the alias *a stands for a mapping or list"),
        ("a: &a [*a]\n", "line 1: the alias *a stands for"),
        (TEXTS, f"line 2: aliases stand for more than {MAX_BYTES} characters"),
        ("optimize:\n\tsteps: 3\n", "line 2: found character '\\t'"),
        ("name: a\x00b\n", "special characters are not allowed"),
        ("- name: a\n", "holds no settings"),
        ("name: a\n---\nname: b\n", "found another document"),
        ("[" * (MAX_BYTES - 1), "nested deeper"),
        ("#" * (MAX_BYTES + 1), f"it is larger than {MAX_BYTES // 1024} KiB"),
        ("? " + "z" * 100_000 + "\n: 1\n", "unknown setting 'zzz"),
        ("".join(f"k{i}: {i}\n" for i in range(2000)), "unknown setting 'k0'"),
        ('name: "\\UFFFFFFFF"', "line 1: a character or number that is too large"),
        ('name: "\\U00110000"', "line 1: a character"),
        ("%YAML 1." + "9" * 5000 + "\n---\nname: a", "line 1: a character or number"),
        ('"a\\nb": 1\n', "unknown setting 'a\\nb'"),
        ('optimize.steps: "1\\n2"\n', "optimize.steps is '1\\n2'"),
    ],
    ids=lambda text: text[:12],
)
def test_files_that_are_no_settings(content, problem, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert problem in error_of(path, MODEL).problem


def test_an_alias_of_a_word_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimize: {seq_len: &length 64}\nquantize: {seq_len: *length}\n")
    assert load_config(str(path), [MODEL]).quantize.seq_len == 64


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe"):
        assert "it is no regular file" in error_of(path, MODEL).problem
    assert "Is a directory" in error_of(tmp_path).problem
    assert "too long" in error_of("a" * 300).problem
    assert "too long" in error_of("a/" * 5000).problem
    assert "null byte" in error_of("a\x00b").problem
    assert error_of("a\nb").problem == "cannot read 'a\\nb': No such file or directory"
    (tmp_path / "a\nb").write_text("- a")
    assert "holds no settings" in error_of(tmp_path / "a\nb").problem
    (tmp_path / "a\nb").write_text("optimize.steps: x")
    assert "optimize.steps is 'x' in" in error_of(tmp_path / "a\nb", MODEL).problem


@pytest.mark.parametrize(
    "word",
    [
        *("rotation.seed=18446744073709551616", "optimize.lr=1e308", "distributed.threads=100000"),
        *("optimize.batch_size=1000000000", "name=a\nb", "evaluate.sources=[[[[[[[[[[[[[[[[[[[[", "/dev/zero"),
    ],
)
def test_the_command_line_says_so_with_its_exit_code(word, capsys):
    assert main(["optimize", word, MODEL]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"dist-spin: .+; .+\n", captured.err)
    assert not captured.out


def test_a_refusal_takes_no_longer_than_starting_python():
    began = time.monotonic()
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "dist_spin",
        "run",
        MODEL,
        "rotation.seed=18446744073709551616",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    imported = set(re.findall(r"\| +(\w+)$", run.stderr, re.MULTILINE))
    assert "yaml" in imported
    assert not {"torch", "transformers", "numpy"} & imported  # whatever this machine is busy with besides
    assert time.monotonic() - began < 10
