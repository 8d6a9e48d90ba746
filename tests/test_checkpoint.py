from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from rllib_dreamer import checkpoint


def write(folder: Path, text: str = "one") -> None:
    """Files as a checkpoint has them: nested, and of known content."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "a.bin").write_text(text)
    (folder / "sub" / "b.bin").write_text(f"{text} more")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    with checkpoint.writing(tmp_path / "c") as folder:
        write(folder)
    return tmp_path / "c"


def test_a_sealed_folder_is_whole(sealed: Path) -> None:
    checkpoint.verify(sealed)
    assert checkpoint.is_complete(sealed)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    assert not checkpoint.is_complete(tmp_path)
    with pytest.raises(ValueError, match="saving was not finished"):
        checkpoint.verify(tmp_path)


@pytest.mark.parametrize("text", ["", '{"files": {"a.bin": [3, "0', "[]", "{}"])
def test_a_damaged_manifest_is_refused(text: str, sealed: Path) -> None:
    """As where the checkpoint was copied and the copy cut off."""
    (sealed / checkpoint.MANIFEST).write_text(text)
    assert not checkpoint.is_complete(sealed)
    with pytest.raises(ValueError, match=r"c is not complete: manifest\.json is damaged"):
        checkpoint.verify(sealed)


def test_a_missing_file_is_named(sealed: Path) -> None:
    (sealed / "sub" / "b.bin").unlink()
    assert not checkpoint.is_complete(sealed)
    with pytest.raises(ValueError, match=r"sub/b\.bin is missing"):
        checkpoint.verify(sealed)


def test_a_shortened_file_is_named(sealed: Path) -> None:
    (sealed / "a.bin").write_text("on")
    assert not checkpoint.is_complete(sealed)
    with pytest.raises(ValueError, match=r"a\.bin has 2 bytes instead of 3"):
        checkpoint.verify(sealed)


def test_a_flipped_byte_is_named(sealed: Path) -> None:
    (sealed / "a.bin").write_text("onE")
    assert checkpoint.is_complete(sealed)  # sizes alone cannot tell
    with pytest.raises(ValueError, match=r"a\.bin is damaged"):
        checkpoint.verify(sealed)


def test_hidden_files_and_copies_do_not_matter(sealed: Path, tmp_path: Path) -> None:
    (sealed / ".tune_metadata").write_text("x")
    (sealed / "note.txt").write_text("x")
    copy = shutil.copytree(sealed, tmp_path / "copy")
    checkpoint.verify(copy)


def test_the_manifest_comes_last(tmp_path: Path) -> None:
    with checkpoint.writing(tmp_path / "c") as folder:
        write(folder)
        assert not list(tmp_path.rglob(checkpoint.MANIFEST))
    files = json.loads((tmp_path / "c" / checkpoint.MANIFEST).read_text())["files"]
    assert sorted(files) == ["a.bin", "sub/b.bin"]


def test_saving_again_replaces_the_checkpoint_and_keeps_other_files(sealed: Path) -> None:
    (sealed / "sub" / "note.txt").write_text("mine")
    with checkpoint.writing(sealed) as folder:
        assert folder != sealed
        folder.mkdir()
        (folder / "a.bin").write_text("two")
    checkpoint.verify(sealed)
    assert (sealed / "a.bin").read_text() == "two"
    assert not (sealed / "sub" / "b.bin").exists()
    assert (sealed / "sub" / "note.txt").read_text() == "mine"
    assert [p.name for p in sealed.parent.iterdir()] == ["c"]


def test_what_lay_in_the_folder_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    """So it may change, even while the checkpoint is written, and stays when another is saved."""
    folder, names = tmp_path / "c", ("run.log", "sub/note.txt")
    (folder / "sub").mkdir(parents=True)
    for name in names:
        (folder / name).write_text("mine")
    with checkpoint.writing(folder) as target:
        write(target)
        (folder / "run.log").write_text("mine, and more")
    (folder / "sub" / "note.txt").write_text("changed")
    checkpoint.verify(folder)
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    assert sorted(files) == ["a.bin", "sub/b.bin"]
    with (folder / "run.log").open("a") as log:
        with checkpoint.writing(folder) as target:
            write(target, "two")
        log.write(", and later")
    checkpoint.verify(folder)
    assert (folder / "run.log").read_text() == "mine, and more, and later"
    assert (folder / "sub" / "note.txt").read_text() == "changed"
    assert (folder / "a.bin").read_text() == "two"


def test_saving_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "c")
    for text in ("one", "two"):
        with checkpoint.writing(tmp_path / "latest") as target:
            write(target, text)
        assert (tmp_path / "c" / "a.bin").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "latest"]


def test_saving_again_that_fails_leaves_the_checkpoint(sealed: Path) -> None:
    with pytest.raises(OSError, match="disk full"), checkpoint.writing(sealed) as folder:
        write(folder, "two")
        raise OSError("disk full")
    checkpoint.verify(sealed)
    assert (sealed / "a.bin").read_text() == "one"
    assert [p.name for p in sealed.parent.iterdir()] == ["c"]


def test_saving_first_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), checkpoint.writing(tmp_path / "c") as folder:
        write(folder)
        raise OSError("disk full")
    assert not (tmp_path / "c").exists()


def test_saving_that_fails_removes_only_its_own(tmp_path: Path) -> None:
    """So that a full disk does not stay full; the error says how far it got."""
    (tmp_path / "c" / "sub").mkdir(parents=True)
    (tmp_path / "c" / "sub" / "note.txt").write_text("mine")
    message = (
        r"No space left.*checkpoint .*/c could not be written\. It got to 0\.0 MB with [\d,.]+ MB"
    )
    with pytest.raises(OSError, match=message) as caught, checkpoint.writing(tmp_path / "c") as c:
        write(c)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ["c", "c/sub", "c/sub/note.txt"]


def test_saving_that_fails_while_files_move_removes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "c" / "sub" / "b.bin").mkdir(parents=True)  # where the checkpoint has a file
    with pytest.raises(IsADirectoryError), checkpoint.writing(tmp_path / "c") as folder:
        write(folder)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert left == ["c", "c/sub", "c/sub/b.bin"]


def test_what_a_kill_left_of_a_first_save_goes_with_the_next(tmp_path: Path) -> None:
    write(tmp_path / "c" / ".c.0123abcd.unfinished")
    with checkpoint.writing(tmp_path / "c") as folder:
        write(folder)
    checkpoint.verify(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["a.bin", "manifest.json", "sub"]


def test_what_a_kill_left_goes_with_the_next_checkpoint(sealed: Path) -> None:
    leftover = sealed.with_name(".c.0123abcd.unfinished")
    write(leftover)
    with checkpoint.writing(sealed) as folder:
        write(folder, "two")
    assert [p.name for p in sealed.parent.iterdir()] == ["c"]


def test_folders_change_places_also_where_the_system_cannot_do_it_at_once(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.ctypes, "CDLL", lambda *args, **kwargs: object())
    with checkpoint.writing(sealed) as folder:
        write(folder, "two")
    checkpoint.verify(sealed)
    assert (sealed / "a.bin").read_text() == "two"
    assert [p.name for p in sealed.parent.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["../outside.bin", "sub/../../outside.bin", "{root}/outside.bin"])
def test_a_manifest_cannot_name_what_lies_outside(name: str, sealed: Path) -> None:
    name = name.format(root=sealed.parent)
    outside = sealed.parent / "outside.bin"
    outside.write_text("secret")
    manifest = json.loads((sealed / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = [6, checkpoint._digest(outside)]
    (sealed / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert not checkpoint.is_complete(sealed)
    with pytest.raises(ValueError, match=rf"{name} leads out of it"):
        checkpoint.verify(sealed)


@pytest.mark.parametrize("name", ["a.bin", "unlisted.bin", "folder"])
def test_a_link_cannot_lead_outside(name: str, sealed: Path) -> None:
    outside = sealed.parent / "outside"
    write(outside)
    (sealed / name).unlink(missing_ok=True)
    (sealed / name).symlink_to(outside if name == "folder" else outside / "a.bin")
    with pytest.raises(ValueError, match=f"{name} leads out of it"):
        checkpoint.verify(sealed)


def test_links_within_and_to_a_checkpoint_are_fine(sealed: Path) -> None:
    (sealed / "again.bin").symlink_to("a.bin")
    (sealed.parent / "latest").symlink_to(sealed)
    checkpoint.verify(sealed.parent / "latest")


@pytest.fixture
def with_replay(tmp_path: Path) -> Path:
    with checkpoint.writing(tmp_path / "r") as folder:
        write(folder)
        write(folder / checkpoint.REPLAY_FOLDER)
    return tmp_path / "r"


def test_the_replay_may_be_left_out_where_it_is_not_needed(sealed: Path, with_replay: Path) -> None:
    assert checkpoint.has_replay(with_replay) and not checkpoint.has_replay(sealed)
    (with_replay / "replay" / "sub" / "b.bin").unlink()  # a part of it is as good as none
    (with_replay / "replay" / "a.bin").write_text("onE")
    checkpoint.verify(with_replay, without_replay=True)
    assert checkpoint.is_complete(with_replay, without_replay=True)
    assert not checkpoint.is_complete(with_replay)
    with pytest.raises(ValueError, match=r"replay/a\.bin is damaged; replay/sub/b\.bin is miss"):
        checkpoint.verify(with_replay)
    shutil.rmtree(with_replay / "replay")
    checkpoint.verify(with_replay, without_replay=True)
    (with_replay / "a.bin").write_text("onE")
    with pytest.raises(ValueError, match=r"not complete: a\.bin is damaged\. Use"):
        checkpoint.verify(with_replay, without_replay=True)
