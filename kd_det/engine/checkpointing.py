"""Checkpoints that are there whole or not at all."""

import os
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
        """As the wrapped ``open``; local files opened for writing replace the old one on exit."""
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
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
