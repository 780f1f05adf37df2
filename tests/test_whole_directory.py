"""A directory that replaces another one: whichever of its two renames was cut off, one whole directory is there.

And shards, which threads write: the same files whatever memory there is, and none once their context is left.
"""

import threading
from pathlib import Path

import pytest
import torch

from dist_spin.errors import UserError
from dist_spin.export import directory
from dist_spin.export.directory import MOST_WRITERS, Shards, whole_directory
from dist_spin.model.weights import SafetensorsWeights


def test_a_new_directory_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_directory(tmp_path / "export") as partial:
            (partial / "weights").write_text(text)
    assert (tmp_path / "export" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("fault", [OSError("no"), KeyboardInterrupt()])
def test_the_old_one_stays_where_the_new_one_fails(tmp_path: Path, fault: BaseException) -> None:
    with whole_directory(tmp_path / "export") as partial:
        (partial / "weights").write_text("old")
    with pytest.raises((UserError, KeyboardInterrupt)), whole_directory(tmp_path / "export"):
        raise fault
    assert (tmp_path / "export" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_old_one_comes_back_after_a_process_killed_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / ".export.before").mkdir()
    (tmp_path / ".export.before" / "weights").write_text("old")
    with whole_directory(tmp_path / "export") as partial:
        assert (tmp_path / "export" / "weights").read_text() == "old"
        (partial / "weights").write_text("new")
    assert (tmp_path / "export" / "weights").read_text() == "new"


def test_the_old_one_comes_back_where_the_second_rename_fails(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "export") as partial:
        (partial / "weights").write_text("old")
    with pytest.raises(UserError), whole_directory(tmp_path / "export") as partial:
        partial.rmdir()
    assert (tmp_path / "export" / "weights").read_text() == "old"


def written(place: Path, count: int = 11) -> dict[str, bytes]:
    place.mkdir()
    with Shards(place, 3 * 400.0) as shards:  # three of the tensors
        for i in range(count):
            shards.add(f"model.{i}.weight", torch.full((10, 10), float(i)).T)
        shards.finish()
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_shards_are_the_same_files_whatever_memory_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for free in (0, 3 * 2400 / 0.4, 1e12):  # no writer beside the caller, two, as many as there may be
        monkeypatch.setattr(directory, "host_bytes_free", lambda free=free: free)
        files.append(written(tmp_path / f"{free:.0f}"))
    assert files[0] == files[1] == files[2]
    assert len(files[0]) == 4 + 1
    weights = SafetensorsWeights(tmp_path / "0")
    assert all(torch.equal(weights.rows(f"model.{i}.weight"), torch.full((10, 10), float(i))) for i in range(11))


def test_a_shard_that_cannot_be_written_is_said_and_no_thread_writes_after_the_end(tmp_path: Path) -> None:
    def add_all() -> None:
        with Shards(tmp_path / "file" / "below", 400.0) as shards:
            for i in range(3 * MOST_WRITERS):
                shards.add(str(i), torch.ones(10, 10))
            shards.finish()

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        add_all()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-writer")]
