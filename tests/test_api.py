"""The Python API: the stages as methods of a run, results as objects, and a process left as it was found."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exported import NO_HAD
from tiny import tiny_run

import dist_spin
from dist_spin.api import Table
from dist_spin.cli import main
from dist_spin.config.loader import load_config
from dist_spin.errors import Interrupted, UserError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

pytestmark = pytest.mark.usefixtures("restored_process")


@pytest.fixture(autouse=True)
def fresh_signals():
    """The handlers of a Python program that has set none itself, as a notebook has them."""
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def run_of(directory: Path, *words: str, **options: Any) -> dist_spin.Run:
    return dist_spin.Run(load_config(None, tiny_run(directory, "model.dtype=float32", *words)), **options)


def process_state() -> dict[str, Any]:
    """What a call could leave behind."""
    return {
        "handlers": [signal.getsignal(number) for number in STOPPING],
        "environment": dict(os.environ),
        "group": dist.is_initialized(),
        "torch threads": torch.get_num_threads(),
        "random": torch.get_rng_state().sum().item(),
        "directory": os.getcwd(),
        "descriptor": wakeup_descriptor(),
    }


def wakeup_descriptor() -> int:
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return descriptor


def test_a_run_from_learning_to_the_loaded_export_leaves_the_process_as_it_was(tmp_path, capsys):
    torch.set_num_threads(2)
    run = run_of(tmp_path, "optimize.steps=3", "quantize.baselines=[hadamard]", *NO_HAD)
    before, threads = process_state(), set(threading.enumerate())

    learned = run.learn_rotations()
    assert process_state() == before
    assert set(threading.enumerate()) <= threads
    assert [row["step"] for row in learned.steps] == [1, 2, 3]
    r1 = learned.tensors()["R1"].double()
    torch.testing.assert_close(r1 @ r1.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-5)
    assert learned.r_bin.is_file()
    assert "learn rotations: step 3/3" in capsys.readouterr().out

    layers = run.quantize()
    assert {(row["variant"], row["layer"]) for row in layers} == {
        (v, i) for v in ("learned", "hadamard") for i in (0, 1)
    }
    assert all(0 < row["error"] < row["rtn_error"] for row in layers)
    rows = run.evaluate()
    assert [row["rotation"] for row in rows] == ["none", "hadamard", "learned"]
    assert list(rows.to_frame()["ppl"]) == [row["ppl"] for row in rows]
    assert [row["ppl"] for row in run.results()] == [row["ppl"] for row in rows]
    assert run.report() == run.path / "report.html"
    model = dist_spin.load(run.export("hf"), device="cpu")
    assert torch.isfinite(model(torch.arange(5, 25)[None]).logits).all()
    assert process_state() == before
    assert set(threading.enumerate()) <= threads


def test_the_command_line_continues_what_a_call_began_and_the_other_way_round(tmp_path, capsys):
    words = tiny_run(tmp_path, "model.dtype=float32", "optimize.steps=2")
    assert main(["optimize", *words]) == 0
    run = dist_spin.Run(tmp_path / "run", quiet=True)  # the directory, with the settings in it
    assert run.config == dataclasses.replace(load_config(None, words), name="run", base_dir=os.getcwd())
    capsys.readouterr()
    assert [row["step"] for row in run.learn_rotations().steps] == [1, 2]
    run.quantize()
    assert capsys.readouterr().out == ""
    assert main(["evaluate", *words]) == 0


def test_settings_are_dictionaries_and_all_their_mistakes_are_told_together(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("model: {path: some/model}\noptimize: {steps: 7}\n")
    run = dist_spin.Run(
        file, name="x", optimize={"lr": 1e-5, "scales": True}, evaluate={"sources": ["pydoc", "text:a,b"]}
    )
    assert (run.config.name, run.config.optimize.steps) == ("x", 7)
    assert (run.config.optimize.lr, run.config.optimize.scales) == (1e-5, True)
    assert run.config.evaluate.sources == ["pydoc", "text:a,b"]
    assert dist_spin.Run(file, model={"revision": None}).config.model.revision is None
    assert dist_spin.Run(model={"path": Path("a/b")}).path == Path("runs/run")
    with pytest.raises(UserError) as caught:
        dist_spin.Run(file, optimise={"lr": 1}, quant={"w_bits": 9, "a_bits": "four"})
    assert caught.value.lines() == [
        "unknown setting 'optimise.lr' in the arguments of Run; did you mean optimize.lr?",
        "quant.a_bits is 'four' in the arguments of Run; it takes a whole number",
        "quant.w_bits is 9; use 2 to 8 bits, or 16 = off",
    ]
    with pytest.raises(TypeError):
        dist_spin.Run(run.config, name="y")


def test_mistakes_are_raised_and_leave_nothing_behind(tmp_path):
    run, before = run_of(tmp_path), process_state()
    with pytest.raises(UserError, match="dist-spin optimize"):
        run.quantize()
    with pytest.raises(UserError, match="did you mean compressed-tensors"):
        run.export("compressed_tensor")
    with pytest.raises(UserError, match="does not exist"):
        dist_spin.Run(model={"path": str(tmp_path / "none")}).learn_rotations()
    assert process_state() == before


def send_when(ready: Any, number: int) -> None:
    def wait_and_send() -> None:
        while not ready():
            threading.Event().wait(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait_and_send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_raises_and_the_same_call_continues(tmp_path, number):
    run, before = run_of(tmp_path, "optimize.steps=16"), process_state()
    send_when(lambda: list((run.path / "rotations").glob("step_*")), number)
    with pytest.raises(Interrupted) as kept:  # kept alive, as notebooks keep the last exception
        run.learn_rotations()
    assert process_state() == before
    assert "after step" in str(kept.value)
    assert [row["step"] for row in run.learn_rotations().steps] == list(range(1, 17))
    gc.collect()


def test_signals_that_the_program_handles_itself_are_left_to_it(tmp_path):
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    run = run_of(tmp_path, "optimize.steps=8")
    send_when(lambda: list((run.path / "rotations").glob("step_*")), signal.SIGTERM)
    assert len(run.learn_rotations().steps) == 8
    assert received == [signal.SIGTERM]


def test_a_call_may_come_from_any_thread(tmp_path):
    outcome: list[Any] = []

    def work() -> None:
        outcome.append(run_of(tmp_path).learn_rotations())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [row["step"] for row in outcome[0].steps] == [1]


def test_a_table_shows_itself_in_text_html_and_pandas():
    table = Table([{"a": 1, "b": 0.123456}, {"a": 2, "c": "<x>"}])
    assert str(table).splitlines() == ["a  b       c", "1  0.1235", "2          <x>"]
    assert "<th>c</th>" in table._repr_html_()
    assert "&lt;x&gt;" in table._repr_html_()
    frame = table.to_frame()
    assert list(frame.columns) == ["a", "b", "c"]
    assert frame["a"].tolist() == [1, 2]


def test_importing_the_package_loads_nothing_heavy():
    code = """if True:
        import sys, dist_spin
        heavy = {"torch", "transformers", "numpy", "yaml", "pandas"}
        assert not heavy & set(sys.modules)
        assert {"Run", "RunConfig", "load"} <= set(dir(dist_spin))
        dist_spin.Run(model={"path": "some/model"})  # settings alone
        assert not {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)
    """
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.distributed
def test_a_script_under_torchrun_takes_one_stage_after_another(tmp_path):
    words = tiny_run(tmp_path, "model.dtype=float32", "optimize.steps=2")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, torch.distributed as dist, dist_spin\n"
        "from dist_spin.config.loader import load_config\n"
        f"run = dist_spin.Run(load_config(None, {words!r}))\n"
        "before = dict(os.environ)\n"
        "steps = run.learn_rotations().steps\n"
        "layers = run.quantize()\n"
        "rows = run.evaluate()\n"
        "assert not dist.is_initialized() and dict(os.environ) == before\n"
        "assert run.is_rank0 == (os.environ['RANK'] == '0')\n"
        "told = f\"{len(steps)} {len(layers)} {rows[-1]['ppl']:.3f}\"\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(told)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stderr
    told = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert told[0] == told[1]
    assert told[0][:2] == ["2", "2"]
