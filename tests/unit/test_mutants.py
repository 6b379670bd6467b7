"""
A test of the tests: every classical mistake in CWD, put into the code, must make a test fail.

A mutant is the module's own source with one replacement. Beside each stands the test that it must
not survive.
"""

import types
from pathlib import Path

import pytest
import torch

import kd_det
from kd_det.terms import LevelwiseTerm
from tests.unit import test_channel_wise_kl as kl
from tests.unit import test_channel_wise_kl_numerics as numerics
from tests.unit import test_cwd as cwd

ROOT = Path(kd_det.__file__).parent


def mutant(path: str, old: str, new: str) -> types.ModuleType:
    """A module of kd_det with one replacement in its source, beside the real one."""
    source = (ROOT / path).read_text()
    assert source.count(old) == 1, f"{old!r} must stand once in {path}: adapt the mutant"
    module = types.ModuleType("mutant")
    # The code's own file name: tracebacks of a surprising failure point somewhere.
    exec(compile(source.replace(old, new), path, "exec"), module.__dict__)
    return module


APPLY = "_ChannelWiseKL.apply(student, teacher.detach(), float(tau), region, channel_weight)"
CHANNELS_AS_POSITIONS = (
    "_ChannelWiseKL.apply(*(x.flatten(2).transpose(1, 2)[..., None] for x in (student, teacher)), "
    "float(tau), None, None)"
)

LOSS = {
    "drop tau^2": (
        ("(tau**2 * mean)", "mean"),
        lambda: kl.test_golden_values(4.0, 0.4757841776107),
    ),
    "tau^2 in the value only": (
        ("ctx.factor = tau * mean / unit", "ctx.factor = mean / tau / unit"),
        lambda: kl.test_gradient_closed_form(4.0),
    ),
    "swap the sides of the KL": (
        (APPLY, APPLY.replace("student, teacher", "teacher, student")),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "swap the sides of the gradient": (
        ("e_s.mul_(step / z_s).addcmul_(e_t, step / z_t, value=-1)",
         "e_t.mul(step / z_t).addcmul_(e_s, step / z_s, value=-1)"),
        lambda: kl.test_gradient_closed_form(1.0),
    ),
    "softmax over channels": (
        (APPLY, CHANNELS_AS_POSITIONS),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "divide by H W": (
        ("1 / max(n * c, 1)", "1 / max(x.numel(), 1)"),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "forget the mean over the batch": (
        ("1 / max(n * c, 1)", "1 / max(c, 1)"),
        lambda: kl.test_images_and_channels_are_averaged(0),
    ),
    "cross-entropy instead of divergence": (
        ("kl = e_t.mul_(gap).sum(1, keepdim=True) / z_t - z_t.log() + z_s.log()",
         "kl = -e_t.mul_(s - s_max).sum(1, keepdim=True) / z_t + z_s.log()"),
        kl.test_zero_iff_equal_up_to_a_constant_per_row,
    ),
    "skip the detach": (
        ("teacher.detach()", "teacher"),
        kl.test_only_a_student_with_gradient_gives_a_graph,
    ),
    "no shift by the maximum": (
        ("s_max = s.amax(1, keepdim=True).clamp_min(lowest)",
         "s_max = 0 * s.amax(1, keepdim=True).clamp_min(lowest)"),
        lambda: numerics.test_finite_at_extreme_logits(torch.float32, 1.0),
    ),
    "region ignored": (
        ("if region is not None:\n        log_w", "if False:\n        log_w"),
        kl.test_region_zero_equals_the_cropped_map,
    ),
    "channel weights not normalised": (
        ("return a / a.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny), ", "return a, "),
        kl.test_equal_channel_weights_are_the_paper,
    ),
    "float16 gradient without its range": (
        ("_FLOAT16_RANGE = 2.0**15", "_FLOAT16_RANGE = 2.0**-5"),
        numerics.test_float16_gradients_survive_a_large_map_and_a_loss_scale,
    ),
    "the backward's factor rounded to float16": (
        ("return torch.mul(grad, factor, out=torch.empty_like(grad)), None",
         "return grad * factor.to(grad.dtype), None"),
        numerics.test_float16_gradients_survive_without_a_loss_scale,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSS)
def test_loss(monkeypatch, name):
    (old, new), check = LOSS[name]
    module = mutant("losses/channel_wise.py", old, new)
    check()  # passes on the code as it is
    monkeypatch.setattr(kl, "channel_wise_kl", module.channel_wise_kl)
    monkeypatch.setattr(numerics, "channel_wise_kl", module.channel_wise_kl)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


LEVELS = {
    "drop a level": (
        ("in self.pairs:\n            level", "in self.pairs[1:]:\n            level"),
        cwd.test_every_level_counts,
    ),
    "the first level's map for all": (
        ("t = target[self.source_tap][pair.target.level]",
         "t = next(iter(target[self.source_tap].values()))"),
        cwd.test_every_level_counts,
    ),
    "skip the connector": (
        ("s = self.connectors[level](student[self.tap][level])", "s = student[self.tap][level]"),
        cwd.test_connectors_come_where_channels_differ_and_learn,
    ),
    "skip the region": (
        ("self.region(context, s, t, pair.target.stride)", "None"),
        cwd.test_padding_is_left_out_and_can_be_left_in,
    ),
    "the student's stride for the target's grid": (
        ("self.region(context, s, t, pair.target.stride)",
         "self.region(context, s, t, pair.student.stride)"),
        cwd.test_a_region_sees_both_maps_on_the_targets_grid,
    ),
    "detach the student": (
        ("self.compare(s, t, region)", "self.compare(s.detach(), t, region)"),
        cwd.test_the_student_is_reached_through_a_frozen_connector,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_levels(monkeypatch, name):
    (old, new), check = LEVELS[name]
    module = mutant("terms/levelwise.py", old, new)
    check()
    for method in ("forward", "aligned"):
        monkeypatch.setattr(LevelwiseTerm, method, getattr(module.LevelwiseTerm, method))
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check()
