"""Checkpoints that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


class AtomicPaths:
    """
    A path manager that writes into a temporary file beside the target and renames it when all is
    written; everything else is the wrapped path manager's. fvcore's checkpointers write in place,
    so that a run killed while saving leaves a truncated file as its last checkpoint.

        checkpointer.path_manager = AtomicPaths(checkpointer.path_manager)

    Args:
        paths: the path manager to wrap.
    """

    def __init__(self, paths: Any) -> None:
        self._paths = paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._paths, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        """
        As the wrapped ``open``; local files opened for writing replace the old one on exit.

        Raises:
            OSError: if a local file cannot be written (the disk is full, say); the old one stays.
        """
        if "w" not in mode or "://" in path:
            return self._paths.open(path, mode, **kwargs)
        return _replacing(self._paths, path, mode, kwargs)


@contextmanager
def _replacing(paths: Any, path: str, mode: str, kwargs: Any) -> Iterator[IO[Any]]:
    temporary = path + ".tmp"
    try:
        with paths.open(temporary, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # or the rename could reach the disk before the content
        os.replace(temporary, path)
    except BaseException as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        if (failure := _os_error(e)) is None:
            raise
        raise OSError(
            f"'{path}' could not be written ({failure.strerror or failure}{_room(path)}). Earlier "
            "checkpoints are intact: make room, and continue with --resume."
        ) from e


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: PyTorch's writer ends with a RuntimeError of its own."""
    while isinstance(error, RuntimeError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def _room(path: str) -> str:
    try:
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
    except OSError:
        return ""
    return f", {free / 2**20:.1f} MiB are free there"
