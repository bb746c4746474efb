"""A folder that is in use, and one whose user has died."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from utils import lock
from utils.errors import InputError
from utils.lock import claim

pytest.importorskip("fcntl")


def hold_in_child(folder: Path) -> int:
    """A process that holds the folder, and is there until it is killed; its number."""
    pid = os.fork()
    if pid == 0:
        lock = claim(folder)
        if os.fork() == 0:  # as a loader's worker: it lives a little longer
            time.sleep(0.5)
            os._exit(0)
        time.sleep(60)
        os._exit(len(lock.name))
    end = time.monotonic() + 10
    while not (folder / ".lock").exists() or not (folder / ".lock").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    return pid


def test_a_folder_in_use_is_refused_until_its_user_is_dead(tmp_path):
    folder = tmp_path / "Demo" / "exp"
    pid = hold_in_child(folder)
    try:
        with pytest.raises(InputError, match=rf"in use by another run \(process {pid}\).*--exp"):
            claim(folder)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with claim(folder) as lock:
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"
        assert not lock.closed
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot use .* as a run's folder: "):
        claim(tmp_path / name)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    claim(tmp_path / "run").close()
    assert "has no locks" in caplog.text and "No locks available" in caplog.text
