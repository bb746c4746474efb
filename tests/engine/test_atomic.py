"""Files written whole, their checksums, and the one that was there before."""

import hashlib

import pytest

from engine import atomic
from engine.atomic import digest_file, is_intact, read_digest, remove, replacing


def write(path, content: bytes, **options) -> None:
    with replacing(path, **options) as file:
        file.write(content)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "a.pth"


def test_the_checksum_lies_beside_the_file(path):
    write(path, b"one")
    assert digest_file(path).read_text() == f"{hashlib.sha256(b'one').hexdigest()}  a.pth\n"
    assert is_intact(path)
    path.write_bytes(b"two")
    assert not is_intact(path)
    remove(path)
    assert list(path.parent.iterdir()) == []


def test_the_file_before_stays_where_it_is_asked_for(path):
    previous = path.with_name("b.pth")
    for content in (b"one", b"two", b"three"):
        write(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert is_intact(path) and is_intact(previous)
    assert digest_file(previous).read_text().endswith("  b.pth\n")
    assert len(list(path.parent.iterdir())) == 4


def test_the_file_before_is_copied_where_there_are_no_links(path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", no_links)
    test_the_file_before_stays_where_it_is_asked_for(path)


@pytest.mark.parametrize("call", range(1, 9))
def test_stopped_at_any_call_both_files_are_whole(path, monkeypatch, call):
    """Every change of the folder in turn is the last one that happens."""
    previous = path.with_name("b.pth")
    for content in (b"one", b"two"):
        write(path, content, previous=previous)
    seen = 0

    class Killed(BaseException):
        pass

    def stopping(real):
        def change(*arguments, **keywords):
            nonlocal seen
            seen += 1
            if seen > call:
                raise Killed
            return real(*arguments, **keywords)

        return change

    with monkeypatch.context() as patch:
        for name in ("link", "replace", "fsync"):
            patch.setattr(atomic.os, name, stopping(getattr(atomic.os, name)))
        for name in ("unlink", "write_text"):
            patch.setattr(atomic.Path, name, stopping(getattr(atomic.Path, name)))
        with pytest.raises(Killed):
            write(path, b"three", previous=previous)
    assert path.read_bytes() in (b"two", b"three")
    assert previous.read_bytes() in (b"one", b"two")
    assert is_intact(path) and is_intact(previous)
    write(path, b"four", previous=previous)
    assert path.read_bytes() == b"four" and is_intact(path)
    assert is_intact(previous)


def test_what_a_killed_process_left_is_swept_away(path):
    write(path, b"one")
    path.with_name(f".{path.name}.kept").write_bytes(b"zero")
    write(path, b"two")
    assert path.read_bytes() == b"two" and is_intact(path)
    assert len(list(path.parent.iterdir())) == 2


def test_an_error_while_writing_leaves_the_old_file(path):
    write(path, b"one")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one"
    assert read_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert len(list(path.parent.iterdir())) == 2
