"""
A test of the tests: every classical mistake in CWD, or in which channels it compares, put into the
code, must make a test fail.

A mutant is the module's own source with one replacement. Beside each stands the test that it must
not survive.
"""

import types
from pathlib import Path

import pytest
import torch

import kd_det
from kd_det.losses import channel_wise_eager
from kd_det.terms import LevelwiseTerm, levelwise
from tests.parts import L2
from tests.unit import test_channel_wise_kl as kl
from tests.unit import test_channel_wise_kl_numerics as numerics
from tests.unit import test_channels as channels
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


CORE = "losses/channel_wise.py"
EAGER = "losses/channel_wise_eager.py"

RUN = "return run(_kernel(backend, students), float(tau), *constants, *students)"
CHANNELS_AS_POSITIONS = (
    "turn = lambda maps: tuple(x.flatten(2).transpose(1, 2)[..., None] for x in maps)\n"
    "    return run(_kernel(backend, students), float(tau), turn(teachers), *constants[1:], "
    "*turn(students))"
)

LOSS = {
    "drop tau^2": (
        (CORE, "(tau**2 * mean)", "mean"),
        lambda: kl.test_golden_values(4.0, 0.4757841776107),
    ),
    "tau^2 in the value only": (
        (CORE, "ctx.factors.append(tau * mean / unit)", "ctx.factors.append(mean / tau / unit)"),
        lambda: kl.test_gradient_closed_form(4.0),
    ),
    "swap the sides of the KL": (
        (CORE, "zip(students, teachers, grads,", "zip(teachers, students, grads,"),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "swap the sides of the gradient": (
        (EAGER, "q_minus_p = q.sub_(p)", "q_minus_p = q.sub_(p).neg_()"),
        lambda: kl.test_gradient_closed_form(1.0),
    ),
    "softmax over channels": (
        (CORE, RUN, CHANNELS_AS_POSITIONS),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "divide by H W": (
        (CORE, "1 / max(n * c, 1)", "1 / max(x.numel(), 1)"),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "forget the mean over the batch": (
        (CORE, "1 / max(n * c, 1)", "1 / max(c, 1)"),
        lambda: kl.test_images_and_channels_are_averaged(0),
    ),
    "cross-entropy instead of divergence": (
        (EAGER, "gap = torch.sub(t, s, out", "gap = torch.sub(0 * t, s, out"),
        kl.test_zero_iff_equal_up_to_a_constant_per_row,
    ),
    "the sums of exponentials forgotten": (
        (EAGER, ".add_(max_p.div_(max_q).log_())", ""),
        lambda: kl.test_golden_values(1.0, 0.4232520034233),
    ),
    "the shift cancels after the sum": (
        (EAGER, "gap.sub_((max_t - max_s).mul_(tau)).mul_(p)",
         "gap.mul_(p).sub_((max_t - max_s).mul_(tau / gap.shape[-1]))"),
        lambda: numerics.test_float32_is_accurate("shifted"),
    ),
    "region ignored": (
        (EAGER, "if log_w is not None:", "if False:"),
        kl.test_region_zero_equals_the_cropped_map,
    ),
    "an empty image counts": (
        (CORE, "kl = kl.masked_fill(nowhere[:, None], 0)", "pass"),
        lambda: kl.test_an_empty_region_is_exactly_zero_and_attached(torch.float32),
    ),
    "channel weights not normalised": (
        (CORE, "return a / a.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny), ",
         "return a, "),
        kl.test_equal_channel_weights_are_the_paper,
    ),
    "channel weights in the value only": (
        (EAGER, "if step is not None:", "if False:"),
        kl.test_one_hot_channel_weights_pick_a_channel_per_image,
    ),
    "give away what a kept graph needs": (
        (CORE, "in_place=not kept", "in_place=True"),
        kl.test_two_backward_calls_accumulate,
    ),
    "float16 gradient without its range": (
        (CORE, "_FLOAT16_RANGE = 2.0**15", "_FLOAT16_RANGE = 2.0**-5"),
        numerics.test_float16_gradients_survive_a_large_map_and_a_loss_scale,
    ),
    "the backward's factor rounded to float16": (
        (CORE, "torch.mul(grad[block], factor, out", "torch.mul(grad[block], factor.half(), out"),
        numerics.test_float16_gradients_survive_without_a_loss_scale,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSS)
def test_loss(monkeypatch, name):
    (path, old, new), check = LOSS[name]
    module = mutant(path, old, new)
    check()  # passes on the code as it is
    if path == EAGER:
        monkeypatch.setattr(channel_wise_eager, "kl_of_rows", module.kl_of_rows)
    else:
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
        ("yield level, s, t,", "yield level, s.detach(), t,"),
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


CHANNELS = {
    "class by class instead of anchor by anchor": (
        ("x.unflatten(1, (self.anchors, -1))",
         "x.unflatten(1, (-1, self.anchors)).transpose(1, 2)"),
        lambda: channels.test_other_anchors_become_one_per_cell(9, 1, "max"),
    ),
    "and where the anchors stay": (
        ("x.unflatten(1, (self.anchors, -1))",
         "x.unflatten(1, (-1, self.anchors)).transpose(1, 2)"),
        lambda: channels.test_another_order_of_classes_is_the_reordered_logits(L2, 3),
    ),
    "the inverse permutation": (
        ("match_names(student.names, target.names)", "match_names(target.names, student.names)"),
        lambda: channels.test_another_order_of_classes_is_the_reordered_logits(L2, 1),
    ),
    "the target's own order": (
        ("theirs = [positions[i] for i in mine]", "theirs = sorted(positions[i] for i in mine)"),
        lambda: channels.test_another_order_of_classes_is_the_reordered_logits(L2, 1),
    ),
    "the mean of the anchors": (
        ("x.amax(1, keepdim=True)", "x.mean(1, keepdim=True)"),
        lambda: channels.test_other_anchors_become_one_per_cell(9, 1, "max"),
    ),
    "the other side's anchors": (
        ("_module(target, theirs, anchors", "_module(student, theirs, anchors"),
        lambda: channels.test_other_anchors_become_one_per_cell(9, 3, "max"),
    ),
    "the other side's classes left in": (
        ("_module(student, mine, anchors", "_module(student, theirs, anchors"),
        lambda: channels.test_classes_of_one_side_are_left_out(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_channels(monkeypatch, name):
    (old, new), check = CHANNELS[name]
    module = mutant("channels.py", old, new)
    check()
    monkeypatch.setattr(levelwise, "common_channels", module.common_channels)
    monkeypatch.setattr(channels, "common_channels", module.common_channels)
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        check()
