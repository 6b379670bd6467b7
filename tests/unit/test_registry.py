"""Registries that answer a wrong name, and random states that are left as they were."""

import random

import numpy as np
import pytest
import torch

from kd_det.registry import TERMS, PartRegistry, did_you_mean
from kd_det.rng import preserved_rng


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


def test_did_you_mean():
    assert did_you_mean("p33", ["p3", "res2"]) == " Did you mean 'p3'?"
    assert did_you_mean("FEATURES", ["features"]) == " Did you mean 'features'?"
    assert did_you_mean("xyz", ["features"]) == ""
    assert did_you_mean("abcx", ["abcd", "abce"]).count("abc") == 2


def test_an_unknown_part_is_answered_with_the_known_ones():
    registry = PartRegistry("term")

    @registry.register()
    class CWD:
        pass

    assert registry.get("CWD") is CWD
    with pytest.raises(KeyError, match=r"no term called 'CDW'. Did you mean 'CWD'\? Known: CWD"):
        registry.get("CDW")


def test_a_name_is_taken_once():
    with pytest.raises(AssertionError):

        @TERMS.register()
        class CWD:
            pass


def test_random_states_are_restored():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with preserved_rng():
        torch.manual_seed(5)
        assert draw() != expected
    assert draw() == expected


def test_random_states_are_restored_after_an_error():
    state = torch.get_rng_state()
    python = random.getstate()

    @preserved_rng()
    def fail():
        draw()
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
