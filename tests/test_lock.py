"""Locks: one holder at a time, a living owner is respected, a dead one is not, also when several want its place."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_spin.errors import UserError
from dist_spin.storage.locks import Held, Lock, exclusive, gone, here, read_owner, stage_lock

QUICK = {"beat": 0.05, "patience": 0.5}
HOLD = """
import sys, time
from pathlib import Path
from dist_spin.storage.locks import Lock
with Lock(Path(sys.argv[1]), "other", beat=0.05, patience=0.5):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def strange(path: Path, **changes: object) -> None:
    """A lock left by a process of another machine."""
    owner = {**here(), "what": "optimize", "host": "elsewhere", "machine": "other", "token": "t", **changes}
    path.write_text(json.dumps(owner))


def test_held_by_a_living_process_then_free(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    other = holder(path)
    with pytest.raises(Held, match=rf"other, process {other.pid} on "), Lock(path, "mine", **QUICK):
        pass
    other.communicate("")
    with Lock(path, "mine", **QUICK) as lock:
        assert read_owner(path)["token"] == lock.owner["token"]
    assert not path.parent.exists()


def test_owner_killed_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    other = holder(path)
    other.kill()
    other.wait()
    assert gone(read_owner(path))
    began = time.monotonic()
    with Lock(path, "mine", beat=0.05, patience=60):
        assert time.monotonic() - began < 2
        assert read_owner(path)["pid"] == os.getpid()


def test_silent_owner_elsewhere_is_replaced_after_patience_even_with_a_wrong_clock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    strange(path, since=time.time() + 1e6)
    assert not gone(read_owner(path))
    began = time.monotonic()
    with Lock(path, "mine", **QUICK):
        assert 0.4 < time.monotonic() - began < 3
    assert not path.exists()


def test_touched_lock_elsewhere_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    strange(path)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(Held, match="on elsewhere"), Lock(path, "mine", **QUICK):
            pass
    finally:
        ended.set()
        thread.join()


def test_of_many_that_want_a_dead_owners_lock_one_at_a_time_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    strange(path)
    inside, most, entered, refused = 0, 0, 0, 0
    guard = threading.Lock()

    def want() -> None:
        nonlocal inside, most, entered, refused
        try:
            with Lock(path, "mine", **QUICK):
                with guard:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                time.sleep(0.3)
                with guard:
                    inside -= 1
        except Held:
            with guard:
                refused += 1

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered >= 1
    assert entered + refused == 8


def test_torn_lock_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.write_text('{"host": "x", "tok')
    with Lock(path, "mine", **QUICK):
        assert read_owner(path)["what"] == "mine"


@pytest.mark.parametrize(
    "content", [b"[1]", b"null", b"{}", b"", b"\xff\xfe\x00", b'{"pid": 7}', b'{"token": [1], "pid": "x"}', b"[" * 9999]
)
def test_a_lock_that_says_nothing_of_its_owner_is_taken_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run" / "locks" / "a.lock"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with Lock(path, "mine", **QUICK):
        assert read_owner(path)["what"] == "mine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"pid": None}, {"pid": "7"}, {"began": None, "pid": 1}, {"pid": 2**40}])
def test_an_owner_of_this_machine_that_cannot_be_a_process_is_gone(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "a.lock"
    path.write_text(json.dumps({**here(), "token": "t", **changes}))
    with Lock(path, "mine", beat=0.05, patience=60):
        assert read_owner(path)["pid"] == os.getpid()


def test_a_directory_in_the_place_of_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.lock").mkdir()
    with pytest.raises(UserError, match=r"a\.lock cannot be") as caught, Lock(tmp_path / "a.lock", "mine", **QUICK):
        pass
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


@pytest.mark.parametrize("directory", ["/proc/self/run", "{}/file/run", "{}/" + "n" * 300])
def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError) as caught, stage_lock(Path(directory.format(tmp_path)), "optimize"):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_killed_taker_over_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It leaves the marker of the owner whose lock it was taking, and its own file."""
    path = tmp_path / "run" / "locks" / "a.lock"
    other = holder(path)
    other.kill()
    other.wait()
    owner = read_owner(path)
    for patience, machine in ((60.0, owner["machine"]), (0.5, "elsewhere")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(owner))
        taker = json.dumps({**owner, "token": "taker", "machine": machine})
        (path.parent / f".a.lock.{owner['token']}.taken").write_text(taker)
        (path.parent / ".a.lock.taker").write_text(taker)
        (path.parent / ".a.lock.taker.new").write_text(taker)
        began = time.monotonic()
        with caplog.at_level("WARNING", "dist_spin"), Lock(path, "mine", beat=0.05, patience=patience):
            assert time.monotonic() - began < 5
        assert f"its owner (other, process {other.pid}" in caplog.text
        assert "has ended" in caplog.text
        assert list(tmp_path.iterdir()) == []


def test_many_that_meet_a_killed_taker_over_still_hold_it_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    strange(path)
    (tmp_path / ".a.lock.t.taken").write_text(json.dumps({**here(), "pid": 2**40, "token": "dead"}))
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def want() -> None:
        nonlocal inside, most, entered
        with exclusive(path, "mine", **QUICK):
            with guard:
                inside, entered = inside + 1, entered + 1
                most = max(most, inside)
            time.sleep(0.05)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, entered) == (1, 6)


def test_owner_that_was_taken_for_dead_leaves(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    other = holder(path)
    os.kill(other.pid, 19)  # stopped: alive, but it does not touch its lock
    owner = read_owner(path)
    path.write_text(json.dumps({**owner, "machine": "other"}))  # so that its process cannot be asked for
    with Lock(path, "mine", **QUICK):
        os.kill(other.pid, 18)
        assert other.wait(5) == 4


def test_parts_exclude_the_whole_but_not_each_other(tmp_path: Path) -> None:
    with stage_lock(tmp_path, "quantize", "0-4"):
        with stage_lock(tmp_path, "quantize", "4-8"), stage_lock(tmp_path, "optimize"):
            pass
        for part in ("", "0-4"):
            with pytest.raises(Held), stage_lock(tmp_path, "quantize", part):
                pass
    with stage_lock(tmp_path, "quantize"), pytest.raises(Held), stage_lock(tmp_path, "quantize", "0-4"):
        pass
