"""Common flags, exit codes and the orderly stop."""

import ctypes
import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs import ConfigError
from utils.cli import StopRequest, common_parser, run_main
from utils.errors import InputError
from utils.log import setup_logging

DOCUMENT = """Do a thing.

Examples:
    python thing.py -n demo
"""


def outcome_of(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (143, 143)])
def test_exit_code_is_what_main_returns(result, code, capsys):
    assert outcome_of(lambda: result, capsys) == (code, "")


@pytest.mark.parametrize("kind", [InputError, ConfigError, FloatingPointError])
def test_bad_input_is_one_line_and_code_2(kind, capsys):
    def main():
        raise kind("first line\n  second line")

    assert outcome_of(main, capsys) == (2, "error: first line second line\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_code_2(number, capsys):
    def main():
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    assert outcome_of(main, capsys) == (2, f"error: {os.strerror(number)}: metrics.jsonl\n")


def test_errors_reach_the_log_file_too(tmp_path, capsys):
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        setup_logging(tmp_path / "train_output.log")

        def bad_input():
            raise InputError("no such image")

        def unforeseen():
            raise KeyError("a slip")

        code, err = outcome_of(bad_input, capsys)
        assert (code, err) == (2, "error: no such image\n")
        with pytest.raises(KeyError):
            run_main(unforeseen)
        assert capsys.readouterr().out == ""
    finally:
        root.handlers[:] = handlers
    text = (tmp_path / "train_output.log").read_text()
    assert "ERROR no such image" in text
    assert "Traceback" in text and "a slip" in text


def test_a_terminal_without_our_signs_gets_their_numbers():
    script = "from utils.cli import run_main; run_main(lambda: print('480\u00d7640 \u2013'))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "480\\xd7640 \\u2013\n"


def test_keyboard_interrupt_is_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert outcome_of(main, capsys)[0] == 130


@pytest.mark.parametrize("count", [1, 10**5], ids=["at the end", "meanwhile"])
def test_whoever_has_read_enough_of_stdout_may_go(count):
    script = f"from utils.cli import run_main; run_main(lambda: print('line\\n' * {count}))"
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 128 + signal.SIGPIPE


def test_another_broken_pipe_keeps_its_traceback():
    def fail():
        raise BrokenPipeError(errno.EPIPE, "of a child")

    with pytest.raises(BrokenPipeError):
        run_main(fail)


def test_the_unforeseen_keeps_its_traceback():
    def main():
        raise KeyError("unforeseen")

    with pytest.raises(KeyError, match="unforeseen"):
        run_main(main)


def test_flags_and_their_defaults():
    found = vars(common_parser(DOCUMENT).parse_args(["-n", "demo"]))
    assert found == {
        "dataset_name": "demo", "exp": "exp", "devices": None, "port": None, "set": [],
        "local_rank": None,
    }  # fmt: skip


def test_set_takes_several_values_several_times():
    arguments = ["-n", "demo", "--set", "a.b=1", "c.d=2", "-p", "29588", "--set", "e.f=3"]
    assert common_parser(DOCUMENT).parse_args(arguments).set == ["a.b=1", "c.d=2", "e.f=3"]


@pytest.mark.parametrize("spelling", ["--local-rank", "--local_rank"])
def test_the_old_launchers_flag_is_accepted(spelling):
    assert common_parser(DOCUMENT).parse_args(["-n", "demo", f"{spelling}=1"]).local_rank == 1


def test_dataset_flags_can_be_left_out():
    assert "dataset_name" not in vars(common_parser(DOCUMENT, has_dataset=False).parse_args([]))


@pytest.mark.parametrize(
    "arguments", [[], ["-n"], ["-n", "demo", "--nonsense"], ["-n", "demo", "-p", "x"]], ids=str
)
def test_wrong_flags_are_input_errors(arguments):
    with pytest.raises(InputError, match="--help"):
        common_parser(DOCUMENT).parse_args(arguments)


def test_help_shows_the_docstring_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        common_parser(DOCUMENT).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert DOCUMENT.strip() in text
    assert "(default: exp)" in text
    assert "default: None" not in text


def test_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def finish_of(child, capfd) -> tuple[int, str]:
    """Fork, run child() until it says that it is ready, send SIGTERM; its exit code and stderr."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(lambda: os.write(told, b"x"))
            os._exit(0)
        finally:
            os._exit(99)
    os.close(told)
    assert os.read(ready, 1), "it ended before it was ready"
    os.kill(pid, signal.SIGTERM)
    begin = time.monotonic()
    _, status = os.waitpid(pid, 0)
    assert time.monotonic() - begin < 20
    os.close(ready)
    return os.waitstatus_to_exitcode(status), capfd.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_step_that_is_stuck_in_the_driver_ends_with_the_process(capfd):
    """The main thread never returns to Python, where handlers of signals run."""

    def child(tell):
        lock = ctypes.CDLL(None).pthread_mutex_lock
        mutex = ctypes.create_string_buffer(64)
        with StopRequest(patience_s=0.2):
            lock(mutex)
            tell()
            lock(mutex)

    code, err = finish_of(child, capfd)
    assert code == 1
    assert "error: SIGTERM came 0.2 s ago and the step has not ended" in err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_signal_to_a_forked_process_is_none_to_this_one(capfd):
    def child(tell):
        context = multiprocessing.get_context("fork")
        runs = context.Event()
        with StopRequest(patience_s=0.2) as stop:
            forked = context.Process(target=lambda: (runs.set(), time.sleep(15)))
            forked.start()
            runs.wait()
            forked.terminate()
            time.sleep(0.6)
            assert stop.asked() == 0
            forked.kill()
            tell()
            while not stop.asked():
                time.sleep(0.01)

    assert finish_of(child, capfd) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_loop_that_asks_may_save_as_long_as_it_takes(capfd):
    """Other signals, such as a loader's end, start no clock."""

    def child(tell):
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with StopRequest(patience_s=0.2) as stop:
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.5)
            tell()
            while not stop.asked():
                time.sleep(0.01)
            time.sleep(0.5)
        os._exit(128 + stop.signal)

    assert finish_of(child, capfd) == (143, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_paused_watch_lets_a_checkpoint_be_written(capfd):
    def child(tell):
        with StopRequest(patience_s=0.2) as stop:
            with stop.pause():
                tell()
                time.sleep(1)
            assert stop.asked() == signal.SIGTERM
        os._exit(143)

    assert finish_of(child, capfd) == (143, "")


@pytest.mark.parametrize("has_child", [False, True])
def test_a_stop_request_leaves_nothing_behind(has_child):
    """Not even where a process that was forked meanwhile, as a loader's, lives on."""
    before, begin = threading.active_count(), time.monotonic()
    with StopRequest(patience_s=60):
        assert threading.active_count() == before + 1
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(15,))
        if has_child:
            child.start()
    assert time.monotonic() - begin < 10
    if has_child:
        child.kill()
        child.join()
    assert threading.active_count() == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("error", "lines"), [(OSError(errno.ENOSPC, "full"), 0), (KeyError(1), 1)])
def test_a_full_disk_under_a_thread_is_left_to_the_main_thread(error, lines, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)

    def fail():
        raise error

    def main():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    code, err = outcome_of(main, capsys)
    assert code == 0
    assert err.count("Traceback") == lines


def test_a_full_disk_under_the_log_file_is_one_line(tmp_path, capsys):
    (tmp_path / "train_output.log").symlink_to("/dev/full")
    setup_logging(tmp_path / "train_output.log")
    code, err = outcome_of(lambda: logging.getLogger().info("a line"), capsys)
    assert (code, err) == (2, f"error: {os.strerror(errno.ENOSPC)}: while writing\n")
    logging.getLogger().handlers[-1].stream = None
