"""What the scripts share on the command line: common flags, exit codes, an orderly stop."""

import argparse
import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from utils.distributed import world_size
from utils.errors import InputError

log = logging.getLogger(__name__)

EXIT_INPUT = 2
ONLY_FILE = {"only_file": True}  # `extra` of a log line that the console leaves out (utils.log)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and the default behind each flag's help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are InputErrors, so that they end as every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def common_parser(description: str | None, *, has_dataset: bool = True) -> argparse.ArgumentParser:
    """The flags that all scripts take; each script adds its own.

    Args:
        description: the script's docstring; --help shows it as it is written.
        has_dataset: False leaves out what names a dataset and its run folder (-n, --exp).
    """
    parser = Parser(description=description, formatter_class=_HelpFormatter)
    if has_dataset:
        parser.add_argument(
            "-n",
            "--dataset_name",
            required=True,
            metavar="NAME",
            help="mfnet | fmb | pst900 | msrs | demo, in any case, or a .yaml file of your own",
        )
        parser.add_argument(
            "--exp",
            default="exp",
            metavar="NAME",
            help="run folder inside experiment/<dataset>/",
        )
    parser.add_argument(
        "-d",
        "--devices",
        metavar="LIST",
        help='"0", "0,1" or "cpu" (default: every visible GPU of the process group, else the CPU)',
    )
    parser.add_argument(
        "-p",
        "--port",
        type=int,
        help="rendezvous port; where torchrun has set one, torchrun's is used",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change any config value, e.g. --set train.batch_size=2 data.num_workers=0",
    )
    parser.add_argument(
        "--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS
    )  # torch.distributed.launch passes it; the environment says the same
    return parser


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """What scripts that score checkpoints take besides: -e, --split, --again."""
    parser.add_argument(
        "-e",
        "--epochs",
        default="best",
        metavar="WHICH",
        help="N, a-b, a- (all from a), best, last, or a path to a .pth or .safetensors file",
    )
    parser.add_argument("--split", default="test", metavar="LIST", help="list to take: test, val")
    parser.add_argument(
        "--again",
        action="store_true",
        help="score anew what was scored with the same checkpoint, config, files and code",
    )


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main() and exit with the project's codes.

    0 or what main returns; 2 with one line "error: ..." on stderr for bad input (a ConfigError is
    one, too), a disk that is full or closed to us, or a loss that is not finite; 130 after Ctrl-C;
    141 where nobody reads stdout any more, as after `| head`; anything else is unforeseen and
    leaves its traceback and 1. The log file gets all of it.

    One of several ranks ends at once on an error: the usual end of a process waits for what the
    others have left on the GPU, and they wait for it.
    """
    threading.excepthook = _report_thread_error
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may have no sign for what we print
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            sys.exit(128 + signal.SIGPIPE)  # as of `| head`: whoever reads has read enough
        message = _user_message(error)
        if logging.getLogger().hasHandlers():
            with contextlib.suppress(OSError):  # it lies on the full disk, perhaps
                log.error(message or "unforeseen", exc_info=message is None, extra=ONLY_FILE)
        if message is None and world_size() == 1:
            raise
        sys.stderr.write(f"error: {message}\n" if message else traceback.format_exc())
        code = EXIT_INPUT if message else 1
        if world_size() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _is_stdout_closed() -> bool:
    """Whether nobody reads what we print any more; then it goes nowhere from now on."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _report_thread_error(arguments: threading.ExceptHookArgs) -> None:
    """A full disk under a writer's thread (TensorBoard's) is an error of the main thread, too."""
    if arguments.exc_value is None or _user_message(arguments.exc_value) is None:
        threading.__excepthook__(arguments)


def _user_message(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    if isinstance(error, InputError | FloatingPointError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return None


class StopRequest:
    """While the context is open, SIGINT and SIGTERM only leave a note; the loop stops by itself.

    Loader processes forked meanwhile inherit this: a signal to the whole process group does not
    take them away before the last step is saved.

    Args:
        patience_s: a loop that does not ask within this time after a signal is stuck, as where
            another rank died and the GPU waits for it: the process then ends with code 1. None
            waits for ever, and so does pause().
    Attributes:
        signal: the first one that came, or None.
    """

    def __init__(self, patience_s: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._patience_s = patience_s
        self._has_asked = threading.Event()
        self._is_paused = False

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        if self._patience_s is not None:
            self._wakeup, self._watched = socket.socketpair()
            self._wakeup.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._wakeup.fileno())
            # a signal to a loader process is none to this one
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
            self._watch = threading.Thread(target=self._end_if_stuck, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._patience_s is not None:
            self._has_asked.set()
            signal.set_wakeup_fd(self._previous_wakeup)
            self._wakeup.shutdown(socket.SHUT_RDWR)  # processes forked meanwhile hold it open
            self._wakeup.close()
            self._watch.join()
            self._watched.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Meanwhile a signal may wait, as while a checkpoint is written."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def asked(self) -> int:
        """The number of the signal that came, or 0; to be called once a step."""
        if self.signal is None:
            return 0
        self._has_asked.set()
        return int(self.signal)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)

    def _end_if_stuck(self) -> None:
        """In a thread, because a main thread that waits for a GPU runs no handler of signals."""
        while number := self._watched.recv(1):
            if number[0] not in self._previous:
                continue
            while not self._has_asked.wait(self._patience_s):
                if self._is_paused:
                    continue
                name = signal.Signals(number[0]).name
                sys.stderr.write(
                    f"error: {name} came {self._patience_s:g} s ago and the step has not ended "
                    f"since; this process ends, the checkpoints are intact\n"
                )
                sys.stderr.flush()
                os._exit(1)
