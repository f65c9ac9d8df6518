"""Files are written whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from uhl_cli.errors import OutputError
from uhl_cli.files import (
    atomic_folder,
    atomic_path,
    claimed,
    refuse_special,
    refuse_unwritable_cache,
    remove_folder,
    remove_leftovers,
    write_bytes,
    write_text,
)


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_content_is_written_and_replaces_the_old(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_bytes(path, b"first, and longer")
    write_text(path, "zweite Fassung: ü")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: ü"
    assert list(path.parent.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "any").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_permissions_in_a_folder_are_those_of_any_new_file(tmp_path):
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "base").mkdir()
        for path in (folder / "model.safetensors", folder / "base" / "model.safetensors"):
            save_file({"a": np.zeros(1)}, path)
    (tmp_path / "any").write_bytes(b"")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "any", *tmp_path.rglob("*.safetensors")]}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_error_inside_leaves_no_trace_and_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            assert path.read_bytes() == b"old"
            assert temporary.parent.parent == path.parent  # on the same disk, so that it can take the old one's place
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_bytes"), (os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize("old", [b"old", None])
def test_full_disk_leaves_no_trace_and_keeps_the_old_file(tmp_path, monkeypatch, owner, name, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_disk)
        with pytest.raises(OutputError, match="No space left") as caught:
            write_bytes(path, b"new")
    assert "file" in caught.value.message
    assert caught.value.hint
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([] if old is None else [old])
    write_bytes(path, b"new")  # the control: with space, it is written
    assert path.read_bytes() == b"new"


def test_full_disk_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_bytes(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_bytes(b"old")
    with pytest.raises(OutputError) as caught:
        write_bytes(tmp_path / "taken" / "file", b"new")
    assert caught.value.hint
    assert (tmp_path / "taken").read_bytes() == b"old"


def test_path_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside").write_bytes(b"old")
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "taken", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_read_only_folder_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:  # permissions do not bind root, so the refusal is imitated

        def refuse(*_arguments, **_options):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    else:
        folder.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        write_bytes(folder / "file", b"new")
    assert "--output" in caught.value.hint
    assert not list(folder.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path):
    path = tmp_path / "file"

    def fill():
        with atomic_path(path) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"new")

    with pytest.raises(OutputError, match="No space left"):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "new" / "folder"
    for text in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / text).write_text(text)
            assert temporary.parent.parent == path.parent
        assert [each.name for each in (path / "below").iterdir()] == [text]
        assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_an_error_inside_keeps_the_old_folder(tmp_path, error):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("old")

    def fail():
        with atomic_folder(path) as temporary:
            (temporary / "file").write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "file").read_text() == "old"


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch, name, old):
    path = tmp_path / "folder"
    if old:
        path.mkdir()
        (path / "file").write_text("old")
    own = Path.rename

    def rename(source: Path, target: Path) -> Path:
        return full_disk() if source.name == "new" else own(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", full_disk) if name == "fsync" else (Path, "rename", rename)))
        with pytest.raises(OutputError, match="No space left"), atomic_folder(path) as temporary:
            (temporary / "file").write_text("new")
    assert [each.name for each in tmp_path.iterdir()] == (["folder"] if old else [])
    assert not old or (path / "file").read_text() == "old"


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"), atomic_folder(tmp_path / "file" / "folder"):
        pytest.fail("the block was entered")


def test_a_link_stays_and_leads_to_the_new_folder(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").touch()
    link.symlink_to(real)
    with atomic_folder(link) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in real.iterdir()] == ["new"]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def killed(path: Path, target: str) -> None:
    """A process that ends without clean-up, as after kill -9, while it writes `path`."""
    script = f"""
import os
from pathlib import Path
from uhl_cli.files import atomic_folder, atomic_path, claimed
path = Path({str(path)!r})
with claimed(path), {target}(path) as temporary:
    (temporary / "file" if temporary.is_dir() else temporary).write_bytes(b"half of the n")
    old = temporary.with_name("old")
    if {target} is atomic_folder and path.exists():
        path.rename(old)
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 9


@pytest.mark.integration
def test_what_a_killed_write_left_goes_with_the_next(tmp_path):
    path, other = tmp_path / "file", tmp_path / "file.more"
    other.write_bytes(b"another file")
    killed(path, "atomic_path")
    assert len(list(tmp_path.iterdir())) == 3  # a hidden folder, the lock and the other file
    write_bytes(path, b"new")
    with claimed(path):  # the lock ended with its process
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(tmp_path.iterdir()) == [path, other]
    killed(path, "atomic_path")
    remove_leftovers(path)
    assert path.read_bytes() == b"new"


@pytest.mark.integration
def test_a_folder_that_a_killed_write_moved_aside_is_put_back(tmp_path):
    path = tmp_path / "folder.v1"
    with atomic_folder(path) as temporary:
        (temporary / "file").write_text("old")
    killed(path, "atomic_folder")
    assert not path.exists()
    with claimed(path):
        assert (path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_another_process_is_writing_is_no_leftover(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"first")
        remove_leftovers(path)
        write_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_claim_is_refused_by_name_while_another_holds(tmp_path):
    path = tmp_path / "new" / "file"
    with claimed(path):
        with pytest.raises(OutputError, match=f"another run is writing {path}"), claimed(path):
            pytest.fail("the block was entered")
        with claimed(path.with_name("other")):
            pass
        write_bytes(path, b"")
    with claimed(path):
        pass
    assert list(path.parent.iterdir()) == [path]


def test_without_locks_everything_is_written_and_nothing_swept(tmp_path, monkeypatch):
    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"first")
        write_bytes(path, b"second")  # takes the first's folder for nobody's only where that is certain
    assert path.read_bytes() == b"first"
    with claimed(path), claimed(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("linked", [False, True])
def test_nothing_but_a_file_is_replaced_by_a_file(tmp_path, kind, linked):
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path(os.devnull)
    before = path.stat()
    if linked:
        (tmp_path / "link").symlink_to(path)
    asked = tmp_path / "link" if linked else path
    with pytest.raises(OutputError, match=r"is not a regular file|is a folder"):
        write_bytes(asked, b"new")
    with pytest.raises(OutputError, match=r"is not a regular file|is a folder"):
        refuse_special(asked)
    if kind != "folder":
        with pytest.raises(OutputError, match="is not a folder"), atomic_folder(asked):
            pytest.fail("the block was entered")
    assert (path.stat().st_mode, path.stat().st_ino) == (before.st_mode, before.st_ino)


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_new_folders_go_again_if_nothing_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="ours"), atomic_path(tmp_path / "there" / "a" / "b" / "file"):
        raise ValueError("ours")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_an_error_is_the_caches_only_where_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    denied, full = (OSError(number, os.strerror(number)) for number in (errno.EACCES, errno.ENOSPC))
    wrapped = ValueError("of a library")
    wrapped.__cause__ = denied
    for error in (denied, wrapped):
        refuse_unwritable_cache(tmp_path / "cache", error)
        with pytest.raises(OutputError, match=r"cannot write to the cache .*file/cache: Not a directory") as caught:
            refuse_unwritable_cache(tmp_path / "file" / "cache", error)
        assert "HF_HOME" in caught.value.hint
    refuse_unwritable_cache(tmp_path / "file" / "cache", ValueError("the data are damaged"))
    with pytest.raises(OutputError, match="No space left"):
        refuse_unwritable_cache(tmp_path / "cache", full)


def test_a_folder_is_removed_whole(tmp_path):
    path = tmp_path / "folder"
    (path / "below").mkdir(parents=True)
    remove_folder(path)
    remove_folder(path)  # there is none
    assert not list(tmp_path.iterdir())
