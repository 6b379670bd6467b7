"""Fixtures of the unit tests."""

import pytest

from tests import toys


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return toys.save_teacher(tmp_path_factory.mktemp("files"), fpn=16)
