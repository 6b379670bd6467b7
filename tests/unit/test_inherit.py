"""Inheritance: what fits by name and shape is copied, and nothing else."""

import pytest
import torch
from torch import Tensor, nn

from kd_det.inherit import Inherit
from kd_det.sources import Source


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"score": nn.Conv2d(4, 3, 1), "box": nn.Conv2d(4, 4, 1)})
        self.backbone = nn.ModuleDict(
            {"fpn_output3": nn.Conv2d(2, 4, 1), "fpn_lateral3": nn.Conv2d(2, 2, 1)}
        )
        self.header = nn.Linear(2, 2)


class Given(Source):
    """A source with these trained weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def trained_state(self) -> dict[str, Tensor]:
        return self.state


def before_and_after(
    inherit: Inherit, state: dict[str, Tensor]
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    student = Student()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    copied = inherit(student, Given(state))
    return copied, before, student.state_dict()


def test_the_defaults_copy_head_and_fpn_outputs_only() -> None:
    theirs = Student().state_dict()
    copied, before, after = before_and_after(Inherit("teacher"), theirs)
    assert set(copied) == {
        f"{m}.{p}"
        for m in ("head.score", "head.box", "backbone.fpn_output3")
        for p in ("weight", "bias")
    }
    for name, x in after.items():
        torch.testing.assert_close(x, (theirs if name in copied else before)[name], rtol=0, atol=0)
        assert name not in copied or not torch.equal(x, before[name])


def test_another_shape_or_no_partner_stays() -> None:
    theirs = {k: v + 1 for k, v in Student().state_dict().items()}
    theirs["head.score.weight"] = torch.zeros(9, 4, 1, 1)
    del theirs["head.box.bias"]
    copied, before, after = before_and_after(Inherit("teacher", ["head"]), theirs)
    assert set(copied) == {"head.score.bias", "head.box.weight"}
    for name in ("head.score.weight", "head.box.bias", "header.weight"):
        assert torch.equal(after[name], before[name])


def test_a_star_and_a_whole_name() -> None:
    theirs = Student().state_dict()
    copied, _, _ = before_and_after(Inherit("teacher", ["*.bias"]), theirs)
    assert copied
    assert all(name.endswith(".bias") for name in copied)
    copied, _, _ = before_and_after(Inherit("teacher", ["head.box.weight"]), theirs)
    assert copied == ["head.box.weight"]


def test_what_is_copied_trains_on_and_leaves_the_source_alone() -> None:
    student, theirs = Student(), Student().state_dict()
    Inherit("teacher", ["head"])(student, Given(theirs))
    kept = theirs["head.box.weight"].clone()
    weight = student.head["box"].weight
    assert weight.requires_grad
    assert weight.is_leaf
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(theirs["head.box.weight"], kept)


def test_half_precision_weights_are_converted() -> None:
    student = Student()
    Inherit("teacher", ["head"])(
        student, Given({k: v.half() for k, v in Student().state_dict().items()})
    )
    assert student.head["box"].weight.dtype == torch.float32


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"INIT_MODULES: 'haed' matches nothing in Student.*head"):
        before_and_after(Inherit("teacher", ["head", "haed"]), Student().state_dict())


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="inherits nothing from 'teacher': of 4 entries"):
        before_and_after(Inherit("teacher", ["head"]), {"head.box.weight": torch.zeros(1)})


def test_a_source_without_trained_weights_says_so() -> None:
    with pytest.raises(ValueError, match="Source has no trained weights"):
        Inherit("teacher", ["head"])(Student(), Source())
