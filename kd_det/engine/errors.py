"""A user's mistake ends in a sentence, everything else in a traceback."""

import dis
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils import comm

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_KINDS = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError)
_SWITCH = "KD_DET_TRACEBACK"
STATUS = 2
"""Exit status of a run that its input stops."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """
    Turn an exception that kd_det itself raised over a user's mistake into one sentence on stderr
    and exit status 2; the traceback goes to the log file, if the run has one. Everything else
    (Detectron2's and PyTorch's errors, bugs) passes, and all of it where the environment variable
    ``KD_DET_TRACEBACK`` is 1.

    Raises:
        SystemExit: in place of the exception.
    """
    if os.environ.get(_SWITCH, "") not in ("", "0"):
        yield
        return
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(_keep)
    try:
        yield
    except _KINDS as e:
        if not is_plain(e):
            raise
        _to_log_files(e)
        rank = comm.get_rank()
        print(
            f"kd_det{f' (process {rank})' if rank else ''}: {sentence(e)}\n"
            f"(With {_SWITCH}=1 in the environment: the traceback.)",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(STATUS) from None
    finally:
        loop.removeFilter(_keep)


def is_plain(error: BaseException) -> bool:
    """Whether a ``raise`` statement of kd_det, not code that it called, raised the exception."""
    if not isinstance(error, _KINDS) or isinstance(error, NotImplementedError):
        return False
    tb = error.__traceback__
    if tb is None:
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    code = tb.tb_frame.f_code
    # PyTorch's operators and a dict's lookup have no frame of their own: what failed there is a
    # bug of the frame that called them.
    raised = code.co_code[tb.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and os.path.realpath(code.co_filename).startswith(_PACKAGE)


def sentence(error: BaseException) -> str:
    """The message; a KeyError's without the quotes that ``str`` puts around it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _keep(record: logging.LogRecord) -> bool:
    """Detectron2's loop logs the traceback of what passes it, on the console too."""
    return not (record.exc_info and record.exc_info[1] and is_plain(record.exc_info[1]))


def _to_log_files(error: BaseException) -> None:
    logger = logging.getLogger("kd_det")
    text = "".join(traceback.format_exception(error))
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in logger.handlers:
        if getattr(handler, "stream", None) not in (sys.stdout, sys.stderr):
            handler.handle(record)
