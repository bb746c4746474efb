"""What the scripts share on the command line: common flags, exit codes, an orderly stop."""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

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
        help="score anew what was scored with the same checkpoint, config and commit",
    )


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main() and exit with the project's codes.

    0 or what main returns; 2 with one line "error: ..." on stderr for bad input (a ConfigError is
    one, too), a disk that is full or closed to us, or a loss that is not finite; 130 after Ctrl-C;
    anything else is unforeseen and leaves its traceback and 1. The log file gets all of it.
    """
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        message = _user_message(error)
        if logging.getLogger().hasHandlers():
            log.error(message or "unforeseen", exc_info=message is None, extra=ONLY_FILE)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        code = EXIT_INPUT
    sys.exit(code)


def _user_message(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    if isinstance(error, InputError | FloatingPointError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return None


class StopRequest:
    """While the context is open, SIGINT and SIGTERM only leave a note; the loop stops by itself.

    `signal` is the first one that came, or None. Loader processes forked meanwhile inherit this:
    a signal to the whole process group does not take them away before the last step is saved.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
