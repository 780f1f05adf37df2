"""Files of a run appear whole or not at all, and damage is noticed."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_spin.errors import UserError
from dist_spin.storage.atomic import _umask, append_line, atomic, read_lines, remove_leftovers, write_json, write_text
from dist_spin.storage.checkpoints import checkpoint_path, checkpoints, newest_checkpoint, prune_checkpoints
from dist_spin.storage.metrics import append_metrics, drop_metrics_after, read_metrics
from dist_spin.storage.rotations import save_final
from dist_spin.storage.run_directory import RunDir, check_fingerprint
from dist_spin.storage.tensor_file import CorruptFile, load_tensors, save_tensors, tensors_digest


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"R1": torch.randn(8, 8, generator=generator), "R2": torch.randn(2, 4, 4, generator=generator).double()}


def listing(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_failure_while_writing_leaves_the_old_file_and_no_scraps(tmp_path):
    target = tmp_path / "results.json"
    write_json(target, {"ppl": 5.9})

    def fail() -> None:
        with atomic(target) as temporary:
            temporary.write_text("half a")
            assert target.read_text() != "half a"  # nothing is seen before the end
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert json.loads(target.read_text()) == {"ppl": 5.9}
    assert listing(tmp_path) == ["results.json"]


def test_directories_are_made_and_the_umask_is_respected(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a" / "b" / "c.txt", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "text"
    assert (tmp_path / "a" / "b" / "c.txt").stat().st_mode & 0o777 == 0o640


def test_the_umask_is_read_by_several_threads_at_once():
    before, interval = os.umask(0o027), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            seen = set().union(*threads.map(lambda _: {_umask() for _ in range(60000)}, range(4)))
    finally:
        sys.setswitchinterval(interval)
        left = os.umask(before)
    assert seen == {left} == {0o027}


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")
    code = (
        "import os, sys; from pathlib import Path; from dist_spin.storage.atomic import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == -9
    assert target.read_text() == "old"


def test_what_killed_writers_leave_is_removed_and_nothing_of_living_ones(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from dist_spin.storage.atomic import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    print(temporary.name, flush=True); sys.stdin.read()"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "layers" / "000.safetensors")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    dead, living = (writer.stdout.readline().strip() for writer in writers)
    writers[0].kill()
    writers[0].wait()
    elsewhere = {age: f".000.safetensors.00000000-7-8-{age:08x}.tmp" for age in (60, 7200)}
    for age, name in elsewhere.items():
        (tmp_path / "layers" / name).write_text("of another machine")
        os.utime(tmp_path / "layers" / name, (time.time() - age,) * 2)
    (tmp_path / "layers" / ".own.tmp").write_text("a file of the user's")
    assert {dead, living} <= set(listing(tmp_path / "layers"))
    remove_leftovers(tmp_path)
    assert listing(tmp_path / "layers") == sorted([living, elsewhere[60], ".own.tmp"])
    writers[1].communicate("", timeout=30)
    assert (tmp_path / "layers" / "000.safetensors").exists()


def test_tensors_come_back_bit_by_bit_with_their_metadata(tmp_path):
    path, tensors = tmp_path / "x.safetensors", state() | {"codes": torch.arange(7, dtype=torch.int8)}
    tensors["transposed"] = tensors["R1"].T  # not contiguous
    save_tensors(path, tensors, {"step": "3"})
    loaded, metadata = load_tensors(path)
    assert metadata["step"] == "3"
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_equal_content_gives_equal_bytes(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for path in paths:
        save_tensors(path, state(), {"step": "3", "seed": "ü", "optimizer": "cayley_sgd"})
    assert len({path.read_bytes() for path in paths}) == 1
    assert load_tensors(paths[0])[1]["seed"] == "ü"


def test_the_digest_sees_names_shapes_dtypes_and_values():
    x = torch.arange(6.0)
    digests = [
        tensors_digest(t)
        for t in ({"x": x}, {"y": x}, {"x": x.view(2, 3)}, {"x": x.view(torch.int32)}, {"x": x + 1e-6}, {})
    ]
    assert len(set(digests)) == len(digests)
    assert tensors_digest({"a": x, "b": x}) == tensors_digest({"b": x, "a": x})


def test_every_truncation_and_every_flipped_byte_is_detected(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, state(), {"step": "3"})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=r"x\.safetensors"):
            load_tensors(path)
    unnoticed = []
    for position in [*range(header), *range(header, len(whole), 5)]:
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(bytes(damaged))
            with contextlib.suppress(CorruptFile):
                load_tensors(path)
                unnoticed.append((position, flip))
    assert unnoticed == []


def test_a_missing_file_and_a_foreign_one_are_corrupt_too(tmp_path):
    with pytest.raises(CorruptFile):
        load_tensors(tmp_path / "nothing.safetensors")
    from safetensors.torch import save_file

    save_file(state(), tmp_path / "foreign.safetensors")  # whole, but without our checksum
    with pytest.raises(CorruptFile, match=r"foreign\.safetensors: cannot be read"):
        load_tensors(tmp_path / "foreign.safetensors")


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_ones_are_named(tmp_path):
    run, said = RunDir(tmp_path), []
    assert newest_checkpoint(run, said.append) is None
    for step in (8, 9, 10, 1000000):
        save_tensors(checkpoint_path(run, step), state(step), {"step": str(step)})
    (run.rotations / ".step_000011.safetensors.abc").write_text("scrap of a killed writer")
    assert [step for step, _ in checkpoints(run)] == [1000000, 10, 9, 8]
    path = checkpoint_path(run, 1000000)
    path.write_bytes(path.read_bytes()[:-1])
    damaged = bytearray(checkpoint_path(run, 10).read_bytes())
    damaged[-1] ^= 1
    checkpoint_path(run, 10).write_bytes(bytes(damaged))
    found = newest_checkpoint(run, said.append)
    assert found is not None
    assert found[1]["step"] == "9"
    assert torch.equal(found[0]["R1"], state(9)["R1"])
    assert len(said) == 2
    assert "step_1000000" in said[0]
    assert "step_000010" in said[1]
    assert "checksum" in said[1]
    assert "using the checkpoint before it" in said[1]
    assert (run.rotations / "step_000010.corrupt").exists()  # evidence is kept, and not looked at again
    assert [e["file"] for e in read_lines(tmp_path / "events.jsonl")] == [path.name, "step_000010.safetensors"]
    said.clear()
    assert newest_checkpoint(run, said.append)[1]["step"] == "9"
    assert said == []


def test_pruning_keeps_the_newest(tmp_path):
    run = RunDir(tmp_path)
    for step in range(1, 8):
        save_tensors(checkpoint_path(run, step), state(step), {"step": str(step)})
        prune_checkpoints(run, 3)
    save_tensors(run.rotations / "final.safetensors", state(), {})
    prune_checkpoints(run, 3)
    assert [step for step, _ in checkpoints(run)] == [7, 6, 5]
    assert (run.rotations / "final.safetensors").exists()


def test_a_changed_field_is_named_with_both_values(tmp_path):
    path = tmp_path / "fingerprint.json"
    first = {"model": "abc", "optimize.lr": 1.5, "data": [1, 2]}
    check_fingerprint(path, first, "run x")
    check_fingerprint(path, dict(first), "run x")
    for field, value in (("model", "abd"), ("optimize.lr", 1.0), ("data", [1])):
        with pytest.raises(UserError) as caught:
            check_fingerprint(path, first | {field: value}, "run x")
        assert f"{field} = {first[field]!r} and now has {value!r}" in str(caught.value)
        assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="new_field"):
        check_fingerprint(path, first | {"new_field": 1}, "run x")
    assert json.loads(path.read_text()) == first


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"event": "b", "ti')
    append_line(path, {"event": "c"})
    append_line(path, {"event": "d"})
    assert [line["event"] for line in read_lines(path)] == ["a", "c", "d"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"\xff\xfe\n", b"[1]\nnull\n7\n", b"[" * 9999, b"{" * 9999])
def test_damaged_lines_are_left_out(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage)
    assert read_lines(path) == []
    append_line(path, {"step": 1})
    assert read_lines(path) == [{"step": 1}]


def test_where_no_checkpoint_is_whole_it_is_said_and_none_is_used(tmp_path):
    run, said = RunDir(tmp_path), []
    for step in (1, 2):
        checkpoint_path(run, step).parent.mkdir(exist_ok=True)
        checkpoint_path(run, step).write_bytes(b"")
    assert newest_checkpoint(run, said.append) is None
    assert len(said) == 3
    assert said[2] == f"no checkpoint in {run.rotations} is whole: learning begins again"


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_text(tmp_path / "file" / "below", "text")
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_device(tmp_path) -> Iterator[Path]:
    """A directory on a device of 64 KiB, really full when it is full: a tmpfs, which root may mount."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # tensors may still be mapped from a file on it


def test_a_full_device_is_one_line_and_loses_nothing(small_device):
    run = RunDir(small_device)
    save_tensors(checkpoint_path(run, 1), state(), {"step": "1"})
    write_text(run.path / "report.txt", "old")
    large = {"R1": torch.zeros(200, 200)}  # 160 kB
    attempts = (
        lambda: save_tensors(checkpoint_path(run, 1), large, {"step": "1"}),
        lambda: save_tensors(checkpoint_path(run, 2), large, {"step": "2"}),
        lambda: save_final(run, large["R1"], large["R1"][None], {}),  # R.bin comes first
        lambda: write_text(run.path / "report.txt", "x" * 200_000),
        lambda: [append_line(run.path / "metrics.jsonl", {"x": "x" * 9999}) for _ in range(10)],
    )
    for attempt in attempts:
        with pytest.raises(UserError, match="no space left on the device while writing") as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    found = newest_checkpoint(run, pytest.fail)
    assert found is not None
    assert torch.equal(found[0]["R1"], state()["R1"])
    assert (run.path / "report.txt").read_text() == "old"
    assert listing(run.rotations) == ["step_000001.safetensors"]  # no scraps that keep the device full


def test_rotations_over_the_file_size_limit_are_a_user_error(tmp_path):
    code = (
        "import resource, sys, torch; from dist_spin.storage.run_directory import RunDir\n"
        "from dist_spin.storage.rotations import save_final; from dist_spin.storage.tensor_file import save_tensors\n"
        "from dist_spin.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "run, r = RunDir(sys.argv[1]), torch.eye(64)\n"
        "for write in (lambda: save_final(run, r, r[None], {}), lambda: save_tensors(run.path / 'x', {'r': r}, {})):\n"
        "    try: write()\n"
        "    except UserError as error: print(error, error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(os.strerror(errno.EFBIG) in line and line.endswith(" 2") for line in lines)
    assert listing(tmp_path / "rotations") == []


def test_a_writer_over_its_file_size_limit_fails_as_a_user_error(tmp_path):
    """A limit of the process (ulimit -f) needs no mount; it reports EFBIG instead of ENOSPC."""
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from dist_spin.storage.atomic import write_text; from dist_spin.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "path = Path(sys.argv[1]); write_text(path, 'old')\n"
        "try: write_text(path, 'x' * 10000)\n"
        "except UserError as error: print(error, error.exit_code)"
    )
    target = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=True, capture_output=True, text=True)
    assert os.strerror(errno.EFBIG) in done.stdout
    assert done.stdout.endswith(" 2\n")
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["file"]


def test_figures_of_earlier_versions_are_read_under_their_names_of_now(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.5, "turn_r1": 0.1, "turn_r2": 0.2, "stall": 0.3})
    append_metrics(tmp_path, 2, {"loss": 2.4})
    append_metrics(tmp_path, 3, {"loss": 2.3})
    first = {"step": 1, "loss": 2.5, "angle_r1": 0.1, "angle_r2": 0.2, "checkpoint_wait_s": 0.3}
    assert read_metrics(tmp_path) == [first, {"step": 2, "loss": 2.4}, {"step": 3, "loss": 2.3}]
    drop_metrics_after(tmp_path, 2)
    assert read_metrics(tmp_path) == [first, {"step": 2, "loss": 2.4}]
