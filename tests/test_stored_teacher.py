"""What full precision predicts is stored once, is what it predicts in every step, and is made again where it is damaged."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_run

from dist_spin.config.loader import load_config
from dist_spin.config.optimize import OptimizeConfig
from dist_spin.errors import Interrupted, UserError
from dist_spin.optimize import stored_teacher
from dist_spin.optimize.train import train
from dist_spin.runtime.distributed import start, stop
from dist_spin.runtime.signals import StopRequest


@pytest.fixture
def world(restored_process):
    yield start("cpu", 60, 1)
    stop()


def settings(place, name, *more):
    """Three steps of two sequences, which take six, and two held-out ones."""
    words = ("optimize.optimizer=cayley_adam", "optimize.lr=0.02", "optimize.scales=true", "optimize.guard_every=1")
    learning = (
        "optimize.steps=3",
        "optimize.guard_sequences=2",
        "optimize.objective=mixed",
        "optimize.micro_batch_size=2",
    )
    return tiny_run(place, f"name={name}", *words, *learning, *more)


class StopAfter(StopRequest):
    """Asked so many times whether to stop, it says no; then yes."""

    def __init__(self, times):
        super().__init__()
        self.times, self.name = times, "SIGTERM"

    def __bool__(self):
        self.times -= 1
        return self.times < 0


def final(place, name):
    return load_file(place / name / "rotations" / "final.safetensors")


def test_with_the_whole_vocabulary_learning_is_that_of_a_second_forward_pass(tmp_path, world):
    for name, k in (("second", 0), ("stored", 97)):
        train(load_config(None, settings(tmp_path, name, f"optimize.teacher_top_k={k}")), world)
    second, stored = final(tmp_path, "second"), final(tmp_path, "stored")
    for name in second:
        torch.testing.assert_close(stored[name], second[name], rtol=0, atol=1e-9)
    assert not (tmp_path / "stored" / "teacher").exists()  # steps alone read it


def test_a_restart_keeps_what_is_stored_and_makes_a_damaged_file_again(tmp_path, world, monkeypatch, caplog):
    saved = []
    save = stored_teacher.StoredTeacher.save
    monkeypatch.setattr(
        stored_teacher.StoredTeacher, "save", lambda self, n, targets: (saved.append(n), save(self, n, targets))
    )
    top_k = "optimize.teacher_top_k=5"
    train(load_config(None, settings(tmp_path, "whole", top_k)), world)
    assert len(set(saved)) == len(saved) == 8
    saved.clear()
    config = load_config(None, settings(tmp_path, "parts", top_k))
    with pytest.raises(Interrupted):
        train(config, world, StopAfter(0))
    assert len(saved) == 8
    files = sorted((tmp_path / "parts" / "teacher").glob("*.safetensors"))
    tensors = load_file(files[0])
    positions, itemsize = tensors["rest"].shape[1], tensors["log_p"].dtype.itemsize
    assert sum(tensor.nbytes for tensor in tensors.values()) == positions * stored_teacher.entry_bytes(5, itemsize)
    damaged = bytearray(files[3].read_bytes())
    damaged[-9] ^= 4
    files[3].write_bytes(bytes(damaged))
    saved.clear()
    train(config, world)
    assert saved == [int(files[3].stem)]
    assert f"{files[3]} checksum does not match" in caplog.text
    assert not files[0].parent.exists()
    files[0].parent.mkdir()  # a finished run that was stopped before it removed them
    train(config, world)
    assert not files[0].parent.exists()
    whole, parts = final(tmp_path, "whole"), final(tmp_path, "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_file_that_is_damaged_while_learning_goes_on_is_an_error_that_says_what_to_do(tmp_path, world):
    config = load_config(None, settings(tmp_path, "run", "optimize.teacher_top_k=5"))

    class Damage(StopRequest):
        def __bool__(self):
            for path in (tmp_path / "run" / "teacher").glob("*.safetensors"):
                path.write_bytes(b"torn")
            return False

    with pytest.raises(UserError, match=r"cannot be read .*; start again: what is missing is computed again"):
        train(config, world, Damage())
    train(config, world)
    assert final(tmp_path, "run")["R1"].shape == (48, 48)


def test_settings_that_do_not_fit_are_refused(tmp_path, world):
    with pytest.raises(UserError, match="cross entropy has no teacher: set it to 0"):
        OptimizeConfig(teacher_top_k=5)
    with pytest.raises(UserError, match="the vocabulary has 97 tokens; use fewer, or 0"):
        train(load_config(None, settings(tmp_path, "run", "optimize.teacher_top_k=98")), world)
    assert not (tmp_path / "run" / "fingerprint.json").exists()  # which would hold the run to what was refused
