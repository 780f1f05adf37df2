"""What the command line shows: help by verb, log lines and progress on terminals and in files, pipes that nobody reads."""

import io
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import tiny_run, write_letters, write_model

from dist_spin.bench.options import BENCHES
from dist_spin.cli import VERBS, main
from dist_spin.config.help import config_help
from dist_spin.errors import EXIT_HANG, EXIT_PIPE, UserError
from dist_spin.runtime.console import CLEAR, Console, shown_on
from dist_spin.runtime.distributed import lost_rank
from dist_spin.runtime.progress import LOGGER, Progress, long_step, say, warn
from dist_spin.storage.locks import exclusive

SECTIONS = {section.partition(" ")[0]: section for section in config_help().strip().split("\n\n")}
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank (\d+) (\w+) (.*)")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_help_of_a_verb_names_the_settings_that_it_reads_and_no_others(capsys):
    for name, verb in VERBS.items():
        assert main([name, "--help"]) == main(["help", name]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: dist-spin {name}")
        words = text.split()
        for group, section in SECTIONS.items():
            single = {entry.partition(".")[2] for entry in verb.reads if entry.startswith(f"{group}.")}
            read = group in verb.reads or (group == "The" and verb.reads) or single
            start = "name output_dir base_dir" if group == "The" else f"  {group}."
            assert text.count(start) == (2 if read else 0), (name, group)
            settings = re.findall(r"^  (?:\w+\.)?(\w+)=", section, re.MULTILINE)
            assert settings
            assert single <= set(settings)
            if read:
                assert all(words.count(setting) >= 2 for setting in single or settings), (name, group)
            if single:
                paragraph = re.split(r"\n(?! {15})", text.split(f"  {group}.", 1)[1])[0]
                assert set(paragraph.split()) == single, (name, group)


@pytest.mark.parametrize("words", [[name] for name in VERBS] + [["bench", name] for name in BENCHES], ids=" ".join)
def test_help_fits_on_a_screen(words, capsys):
    assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 8 < len(lines) < 60
    assert max(map(len, lines)) < 125


def test_help_of_a_setting_a_group_and_a_word_that_is_neither(capsys):
    assert main(["help", "optimize.guard_every"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  ([\w.]+)=", text, re.MULTILINE) == ["optimize.guard_every"]
    assert "loss" in text
    for words in (["help", "quant."], ["help", "quant"], ["--help", "help", "quant."]):
        assert main(words) == 0
        assert capsys.readouterr().out == SECTIONS["quant"] + "\n"
    assert main(["help", "optimise.lr"]) == 2
    assert "did you mean optimize.lr?" in capsys.readouterr().err


def test_help_all_explains_every_setting(capsys):
    for words in (["run", "--help-all"], ["optimize", "configs/none.yaml", "--help-all", "a=b"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(section in text for section in SECTIONS.values())


@pytest.mark.parametrize(
    "words",
    [
        ["optimize", "none.yaml", "optimize.steps=3"],
        ["optimize", "none.yaml", "--optimize.steps=3"],
        ["optimize", "none.yaml", "--optimize.steps", "3"],
        ["--quiet", "optimize", "none.yaml", "--name", "x"],
        ["quantize", "--layers", "0:1", "none.yaml", "--optimize.lr", "-1", "a.b=c"],
        ["quantize", "none.yaml", "quant.w_bits=4", "--layers=0:1", "--verbose", "--quant.k_bits=8"],
        ["quantize", "none.yaml", "--slurm=partition=gpu", "--cluster", "local", "--slurm", "qos=x", "--workers=2"],
        ["quantize", "--boundaries", "none.yaml"],
        ["export", "none.yaml", "--format", "hf", "export.profile=no-had", "--output=/nowhere"],
        ["submit", "none.yaml", "--cluster=local", "optimize.steps=3"],
    ],
)
def test_settings_and_options_may_stand_in_any_form_and_order(capsys, words):
    assert main(words) == 2  # the words were understood: what is missing is the file
    assert capsys.readouterr().err.startswith("dist-spin: cannot read none.yaml: ")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["quantize", "--layers", "0-3"], "--layers: '0-3' is not A:B"),
        (["quantize", "--layers"], "--layers: expected one argument"),
        (["quantize", "--cluster", "sky"], "--cluster: invalid choice: 'sky'"),
        (["generate", "runs/none", "text", "--tokens", "-3"], "--tokens: '-3' is no whole number"),
        (["cancel"], "cancel: no RUN is given, the directory of a run"),
        (["logs", "runs/none", "more"], "logs does not take more"),
        (["bench", "speed"], "invalid choice: 'speed'"),
        (["bench", "scaling"], "required: files"),
        (["bench", "scaling", "--quiet", "none.json", "--steps", "a"], "--steps: invalid int value: 'a'"),
    ],
)
def test_mistakes_in_options_are_one_line_with_the_help_to_ask_for(capsys, words, problem):
    assert main(words) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    assert problem in line
    assert f"; `dist-spin {' '.join(words[: 2 if 'scaling' in words else 1])} --help` says what it takes" in line


@pytest.mark.parametrize("word", ["a" * 300, "~nobody-of-this-name/a.yaml", "a\0b"])
@pytest.mark.parametrize("verb", ["run", "generate", "report"])
def test_a_path_that_no_file_can_have_is_one_line(capsys, verb, word):
    assert main([verb, word]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_log_line_clears_the_line_of_progress_on_a_terminal_and_draws_it_again():
    stream = Terminal()
    with shown_on(Console(stream)):
        progress = Progress("step", 3)
        assert stream.getvalue() == ""
        progress.advance("loss 2")
        first = stream.getvalue()
        assert re.fullmatch(re.escape(CLEAR) + r"step 1/3  loss 2  \d:\d\d left", first)
        say("a checkpoint was damaged")
        redrawn = stream.getvalue().removeprefix(first)
        assert redrawn == f"{CLEAR}a checkpoint was damaged\n{first.removeprefix(CLEAR)}"
        progress.advance()
        progress.advance()
        assert stream.getvalue().endswith("\n")
        say("done")
        assert stream.getvalue().endswith(f"\n{CLEAR}done\n")
        Progress("layer", 9).advance()
    assert stream.getvalue().endswith(" left\n")  # what follows begins a line of its own
    assert max(map(len, stream.getvalue().split(CLEAR))) < 80


def test_a_long_line_of_progress_is_shortened_while_it_is_redrawn_and_whole_at_its_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    text = "measure " + "x" * 90
    with shown_on(Console(stream)):
        progress = Progress(text, 2)
        progress.advance("loss 2")
        (line,) = stream.getvalue().split(CLEAR)[1:]
        assert len(line) == 79
        assert re.fullmatch(r"measure x+…x+ 1/2  loss 2  \d:\d\d left", line)
        progress.advance("loss 1")
        assert f"{CLEAR}{text} 2/2  loss 1  took 0:00\n" in stream.getvalue()


def said(rank: int = 0, **options: bool) -> list[tuple[str, ...]]:
    """Rank, level and text of the lines in a file."""
    stream = io.StringIO()
    with shown_on(Console(stream, rank, **options)):
        progress = Progress("step", 2)
        progress.advance()
        say("told")
        warn("warned")
        progress.advance()
    lines = [LINE.fullmatch(line) for line in stream.getvalue().splitlines()]
    return [line.groups() for line in lines if line is not None or pytest.fail(stream.getvalue())]


def test_lines_in_a_file_carry_time_rank_and_level_and_other_ranks_are_quiet():
    told, warned = ("0", "INFO", "told"), ("0", "WARNING", "warned")
    progress = ("0", "INFO", "step 2/2    took 0:00")  # the first came before its time
    assert said() == [told, warned, progress]
    assert said(quiet=True) == [warned]
    assert said(verbose=True) == [("0", "DEBUG", "step: 0 of 2 are done"), told, warned, progress]
    assert said(rank=3) == said(rank=3, quiet=True) == [("3", "WARNING", "warned")]
    assert ("3", "INFO", "told") in said(rank=3, verbose=True)


def test_every_rank_knows_where_it_is_though_it_says_nothing():
    console = Console(io.StringIO(), rank=1)
    with shown_on(console):
        assert console.position() == "before the first step"
        progress = Progress("layer", 2, show=False)
        assert console.position() == "at layer 1 of 2"
        progress.advance()
        assert console.position() == "at layer 2 of 2"


def test_a_command_leaves_the_logger_as_it_found_it(capsys):
    before = (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers))
    assert main(["status", "/nowhere"]) == 2
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before
    assert logging.getLogger("dist_spin") is LOGGER


def test_help_and_mistakes_answer_without_torch():
    code = """if True:
        import sys
        from dist_spin.cli import main
        for words, code in (
            (["--help"], 0),
            (["--version"], 0),
            (["status", "--help"], 0),
            (["help", "optimize.lr"], 0),
            (["run", "--help-all"], 0),
            (["--help-all"], 0),
            (["quantize", "none.yaml", "--layers", "0:3"], 2),
            (["optimize", "optimize.steps=3"], 2),
            (["export", "model.path=/none", "--format", "hf"], 2),
            (["status", "/none"], 2),
            (["chat", "/none"], 2),
            (["bench", "--help"], 0),
            (["bench", "optimize", "--help"], 0),
            (["bench", "scaling", "--help"], 0),
            (["bench", "quantize", "--sequences", "many"], 2),
        ):
            assert main(words) == code, words
            loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
            assert not loaded, (words, loaded)
    """
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", [["run", "--help-all"], ["--help"]])
def test_a_reader_who_leaves_ends_a_command_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dist_spin", *words]
    ended = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (EXIT_PIPE, "")


def test_a_lost_rank_is_told_from_other_errors():
    transport = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer\nmore"
    assert lost_rank(RuntimeError(transport)) == transport.splitlines()[0]
    assert lost_rank(dist.DistNetworkError("the client socket has timed out")) == "the client socket has timed out"
    assert lost_rank(dist.DistBackendError("NCCL error: remote process exited")) is not None
    for error in (
        RuntimeError("a request timed out"),
        RuntimeError("[enforce fail at gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 4 vs 2"),
        dist.DistBackendError("NCCL error: ncclInvalidUsage: This usually reflects invalid usage of NCCL library."),
        ConnectionError("the hub does not answer: Connection refused"),
    ):
        assert lost_rank(error) is None


@pytest.mark.distributed
def test_ranks_that_never_come_are_lost_ranks(tmp_path):
    model = write_model("mha", tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0"}
    words = [f"model.path={model}", f"output_dir={tmp_path}", "distributed.device=cpu", "distributed.timeout_s=3"]
    command = [sys.executable, "-m", "dist_spin", "optimize", *words]
    ended = subprocess.run(command, check=False, env=os.environ | alone, capture_output=True, text=True)
    assert ended.returncode == EXIT_HANG, ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("dist-spin: "))
    assert line.startswith(
        f"dist-spin: rank 0 of 2 on {socket.gethostname()}: no answer from another rank within 3 s before"
    )
    assert line.endswith("; start again to resume")
    assert "Traceback" not in ended.stderr
    assert not Path(tmp_path / "run").exists()


def lines_of(work) -> list[str]:
    """What the user is told while `work` runs."""
    stream = Terminal()
    with shown_on(Console(stream)):
        work()
    return stream.getvalue().replace(CLEAR, "").splitlines()


def test_a_long_step_is_told_when_it_lasts_and_a_short_one_is_not(monkeypatch):
    def work(seconds: float, *, fails: bool = False) -> None:
        with long_step("open the model m"):
            threading.Event().wait(seconds)
            if fails:
                raise UserError("no", "yes")

    monkeypatch.setattr("dist_spin.runtime.progress.SILENCE_S", 0.2)
    threads = set(threading.enumerate())
    assert lines_of(lambda: work(0.0)) == []
    first, last = lines_of(lambda: work(0.5))
    assert first == "open the model m ..."
    assert re.fullmatch(r"open the model m: took \d:\d\d", last)
    with pytest.raises(UserError):
        work(0.0, fails=True)
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
    assert set(threading.enumerate()) <= threads


def test_the_long_steps_of_a_stage_have_their_lines(tmp_path, monkeypatch, capsys, restored_process):
    monkeypatch.setattr("dist_spin.runtime.progress.SILENCE_S", 0.0)
    words = tiny_run(tmp_path, "model.dtype=float32", "optimize.source=pydoc")
    write_letters(tmp_path / "model")
    assert main(["optimize", *words]) == 0
    told = capsys.readouterr().err
    for step in (
        "import torch",
        "open the model",
        "read and tokenise pydoc",
        "load the weights of 2 layers",
        "take the first step",
    ):
        assert step in told


def test_waiting_for_a_lock_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_spin.runtime.progress.SILENCE_S", 0.1)
    path = tmp_path / "locks" / "results.lock"
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(path, "results.json"):
            ready.set()
            done.wait(0.6)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()

    def wait() -> None:
        with exclusive(path, "results.json"):
            pass

    told = lines_of(wait)
    holder.join()
    assert told[0] == "wait for results.json, at which another process is ..."
