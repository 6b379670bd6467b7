"""Fixtures of the integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ToyRun, write_run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy run that works."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyRun]:
    """A copy of it to break."""
    run = ToyRun(whole_run, tmp_path / "run", monkeypatch)
    yield run
    run.forget()
