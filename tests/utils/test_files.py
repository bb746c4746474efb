"""Files that appear whole."""

import os

import pytest

from utils.errors import InputError
from utils.files import write_whole


@pytest.mark.parametrize("content", ["größer\n", b"\x00\xff\n"], ids=["text", "bytes"])
def test_writes_what_is_given_and_makes_folders(tmp_path, content):
    path = tmp_path / "a" / "b.txt"
    for _ in range(2):
        write_whole(path, content)
        expected = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == expected
        assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("outlasts", [False, True])
def test_waits_for_the_disk_where_it_is_asked_to(tmp_path, monkeypatch, outlasts):
    calls = []
    path = tmp_path / "a.txt"
    monkeypatch.setattr(os, "fsync", lambda _: calls.append(path.exists()))
    write_whole(path, "new", outlasts_power_cut=outlasts)
    assert calls == [False] * outlasts


@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), call, fail)
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: No space left"):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*table.md: "):
        write_whole(tmp_path / "file" / "table.md", "text")
