"""A directory that replaces another one: whichever of its two renames was cut off, one whole directory is there."""

from pathlib import Path

import pytest

from dist_spin.errors import UserError
from dist_spin.export.directory import whole_directory


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
