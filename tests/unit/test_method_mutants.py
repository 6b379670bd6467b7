"""
A test of the tests of the published methods: classical mistakes, put into the code one by one, must
make the test that stands beside them fail. See `tests.unit.test_mutants`.
"""

import inspect
import sys
import types

import pytest
import torch

from kd_det.losses import pixel_wise_kl, weighted_bce
from kd_det.registry import REGIONS, SOURCES, TERMS
from tests.lone_terms import toy_context, toy_student
from tests.parity import test_methods_parity as parity
from tests.unit import test_method_losses as properties
from tests.unit import test_method_scores as scores
from tests.unit import test_method_terms as methods
from tests.unit import test_mutants


def mutate(monkeypatch, path, old, new):
    """Put the code of a mutant into the real functions and methods, wherever they are held."""
    for registry in (TERMS, REGIONS, SOURCES):  # a second class of one name would be refused
        monkeypatch.setattr(registry, "register", lambda: lambda cls: cls)
    changed = vars(test_mutants.mutant(path, old, new))
    name = "kd_det." + path.removesuffix(".py").replace("/", ".")
    for key, thing in vars(sys.modules[name]).items():
        if getattr(thing, "__module__", "") != name:
            continue
        pairs = [(thing, changed[key])]
        if isinstance(thing, type):
            pairs = [(f, vars(changed[key])[k]) for k, f in vars(thing).items()]
        for real, mutated in pairs:
            real, mutated = inspect.unwrap(real), inspect.unwrap(mutated)  # of torch.no_grad()
            if isinstance(real, types.FunctionType):
                for part in ("__code__", "__defaults__", "__kwdefaults__"):
                    monkeypatch.setattr(real, part, getattr(mutated, part))


def must_fail(monkeypatch, mutant, *args):
    """``mutant``: path, what stands there, what is put in its place, the test that finds out."""
    path, old, new, check = mutant
    check(*args)  # passes on the code as it is
    mutate(monkeypatch, path, old, new)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(*args)


@pytest.fixture(scope="module")
def student():
    return toy_student()


def in_a_step(check, *args):
    """A test of terms, with the context that pytest would give it."""
    return lambda student: check(toy_context(student), *args)


def plain(check, *args):
    return lambda student: check(*args)


GOLDEN_AT = plain(properties.test_golden_attention_transfer)
GOLDEN_PI = plain(properties.test_golden_pixel_wise)
TEACHER_IS_CONSTANT = properties.test_the_teacher_and_the_region_are_constants
LEVELS = methods.test_a_level_is_the_loss_of_its_maps_under_the_region

MUTANTS = {
    # -- AT
    "AT: no norm": (
        "losses/attention_transfer.py", "return x / norm.clamp_min(_SMALLEST)", "return x",
        GOLDEN_AT,
    ),
    "AT: sum of absolutes for the norm": (
        "losses/attention_transfer.py", "vector_norm(share,", "vector_norm(share, 1,", GOLDEN_AT,
    ),
    "AT: summed cells": (
        "losses/attention_transfer.py", 'over_cells == "mean":', 'over_cells == "sum":', GOLDEN_AT,
    ),
    "AT: sign instead of energy": (
        "losses/attention_transfer.py", "x.square() if p == 2 else x.abs().pow(p)", "x",
        plain(properties.test_attention_minds_neither_scale_nor_sign),
    ),
    "AT: padding in the norm": (
        "losses/attention_transfer.py", "x if weights is None else x * weights", "x; weights",
        plain(parity.test_attention_transfer, (2, 4, 3, 4), 2, 2.0, "mean"),
    ),
    "AT: the teacher learns": (
        "losses/attention_transfer.py", "with torch.no_grad():", "if True:",
        plain(TEACHER_IS_CONSTANT, "AT"),
    ),
    "AT: the student is detached": (
        "losses/attention_transfer.py", "energy(student, p)", "energy(student.detach(), p)",
        plain(properties.test_gradcheck, "AT"),
    ),
    "AT: the power is lost": (
        "terms/at.py", "yield level, energy(s, self.p)", "yield level, energy(s)",
        in_a_step(methods.test_attention_transfer_takes_other_channels_as_they_are),
    ),
    # -- PI
    "PI: no tau^2": (
        "losses/predictions.py", "return tau**2 * (p * gap)", "return (p * gap)",
        plain(properties.test_pixel_wise_gradient_closed_form),
    ),
    "PI: sides swapped": (
        "losses/predictions.py",
        "p = log_p.exp()", "p = log_q.exp()",
        plain(properties.test_the_divergence_is_teacher_to_student),
    ),
    "PI: mean over classes": (
        "losses/predictions.py", "(p * gap).sum(dim)", "(p * gap).mean(dim)", GOLDEN_PI,
    ),
    "PI: softmax over anchors": (
        "losses/pixel_wise.py", "tau=tau, dim=2,", "tau=tau, dim=1,",
        plain(properties.test_anchors_have_a_softmax_each),
    ),
    "PI: the entropy stays": (
        "losses/predictions.py", "value = value - entropy", "pass",
        plain(properties.test_zero_and_flat_where_both_agree, "PI sigmoid"),
    ),
    "PI: cross-entropy without its entropy": (
        "losses/predictions.py", "gap = -log_q if cross_entropy else log_p - log_q",
        "gap = log_p - log_q", GOLDEN_PI,
    ),
    "PI: the teacher learns": (
        "losses/predictions.py", "with torch.no_grad():\n        log_p",
        "if True:\n        log_p",
        plain(TEACHER_IS_CONSTANT, "PI"),
    ),
    "PI: the normaliser is ignored": (
        "losses/pixel_wise.py", "if normalizer is None:", "if True:",
        plain(properties.test_a_normalizer_divides_the_sum_over_the_batch, pixel_wise_kl),
    ),
    "PI: the tap's classes are not asked for": (
        "terms/anchor_classes.py", "self.classes.get(level, 0)", "self.num_classes",
        plain(scores.test_a_softmax_is_over_the_classes_that_an_anchor_of_both_sides_has,
              scores.level("abc", 9), scores.level("cxa", 9), "ac", 9),
    ),
    "PI: one softmax for all anchors": (
        "channels.py", "student.per_anchor),\n        anchors,", "student.per_anchor),\n        0,",
        plain(scores.test_a_softmax_is_over_the_classes_that_an_anchor_of_both_sides_has,
              scores.level("abc", 9), scores.level("cab", 9), "abc", 9),
    ),
    "PI: positives are cells": (
        "terms/normalizer.py", 'context.positives if normalizer == "positives" else None', "None",
        in_a_step(scores.test_pixel_wise_options_reach_the_loss),
    ),
    # -- imitation: FitNet, FGFI
    "imitation: no half": (
        "losses/imitation.py", "mean_over_cells(per_cell, region) / 2",
        "mean_over_cells(per_cell, region)",
        plain(properties.test_imitation_of_a_constant_difference),
    ),
    "imitation: absolute difference": (
        "losses/imitation.py", ".square()", ".abs()",
        plain(properties.test_imitation_of_a_constant_difference),
    ),
    "imitation: divided by all cells": (
        "losses/reduce.py", "return (w * x).sum() / _or_one(w.sum())", "return (w * x).mean()",
        plain(properties.test_imitation_of_a_constant_difference),
    ),
    "imitation: an empty region divides by zero": (
        "losses/reduce.py", "return torch.where(total > 0, total, 1.0)", "return total",
        plain(properties.test_an_empty_region_is_exactly_zero_and_attached, "imitation",
              torch.float32),
    ),
    "FGFI: mean over channels": (
        "terms/fgfi.py", ', over_channels="sum"', "",
        in_a_step(methods.test_fine_grained_imitation_is_its_region_times_the_channels),
    ),
    "FGFI: the region is dropped": (
        "terms/fgfi.py", "region=region, over", "over",
        in_a_step(methods.test_fine_grained_imitation_is_its_region_times_the_channels),
    ),
    "FGFI: from the first iteration": (
        "terms/fgfi.py", "Constant(start_iter=400)", "Constant()",
        plain(methods.test_what_is_published_is_the_default),
    ),
    "FitNet: the region is dropped": (
        "terms/fitnet.py", ", region=region)", ")",
        in_a_step(methods.test_where_features_are_imitated_is_the_regions_business),
    ),
    # -- Channel Distillation
    "channel mean: squared before the mean": (
        "losses/channel_mean.py", "gap.mean((2, 3)).square()", "gap.square().mean((2, 3))",
        plain(properties.test_golden_channel_distillation),
    ),
    "channel mean: mean over channels first": (
        "losses/channel_mean.py", "gap.mean((2, 3)).square()", "gap.mean((1, 2, 3)).square()",
        plain(properties.test_golden_channel_distillation),
    ),
    "channel mean: divided by all cells": (
        "losses/channel_mean.py", "total = w.sum((2, 3))", "total = (w + 1).sum((2, 3))",
        plain(properties.test_region_zero_equals_the_cropped_map, "channel mean"),
    ),
    # -- PKD
    "PKD: biased variance": (
        "losses/pearson.py", "return n / max(n - 1, 1)", "return 1.0",
        plain(properties.test_golden_pkd),
    ),
    "PKD: statistics of an image": (
        "losses/pearson.py", "return x.mean((0, 2, 3), keepdim=True)",
        "return x.mean((2, 3), keepdim=True)",
        plain(properties.test_golden_pkd),
    ),
    "PKD: no half": (
        "losses/pearson.py", "_mean(per_cell, w).mean() / 2", "_mean(per_cell, w).mean()",
        plain(properties.test_golden_pkd),
    ),
    "PKD: eps inside of the root": (
        "losses/pearson.py", "var.clamp_min(_SMALLEST).sqrt() + eps", "(var + eps).sqrt()",
        plain(properties.test_golden_pkd),
    ),
    "PKD: a root without a slope": (
        "losses/pearson.py", "var.clamp_min(_SMALLEST)", "var",
        plain(properties.test_extremes_stay_finite, "PKD", "zero"),
    ),
    "PKD: centred once": (
        "losses/pearson.py", "centred = centred - _mean(centred, w)", "pass",
        plain(properties.test_pearson_of_a_constant_channel_is_zero_even_if_it_is_large),
    ),
    "PKD: padding in the statistics": (
        "losses/pearson.py", "_mean(centred.square(), w)", "_mean(centred.square(), None)",
        plain(properties.test_region_zero_equals_the_cropped_map, "PKD"),
    ),
    # -- FKD
    "FKD: mean instead of total": (
        "losses/root.py", "squares.sum()", "squares.mean()", plain(properties.test_golden_fkd),
    ),
    "FKD: no root": (
        "losses/root.py", "return root(squares.sum(), eps=eps)", "return squares.sum()",
        plain(properties.test_golden_fkd),
    ),
    "FKD: infinite slope at 0": (
        "losses/root.py", "torch.where(total < eps, total / eps**0.5, total.clamp_min(eps).sqrt())",
        "total.sqrt()", plain(properties.test_the_root_has_a_slope_at_zero),
    ),
    "FKD: connected means": (
        "terms/fkd.py", "own, t = on_one_grid(student[self.tap][level], t, pair)", "own = s[:, :4]",
        in_a_step(methods.test_fkd_is_its_four_parts),
    ),
    "FKD: one weight for another": (
        "terms/fkd.py", "value + self.spatial_weight *", "value + self.non_local_weight *",
        in_a_step(methods.test_fkd_is_its_four_parts),
    ),
    "FKD: padding in the pooled channels": (
        "terms/fkd.py", "(x * real).sum((2, 3)) / inside", "x.mean((2, 3))",
        in_a_step(methods.test_fkd_is_its_four_parts),
    ),
    "FKD: the teacher's side is detached": (
        "terms/fkd.py", "self.target_blocks[level](t, real)",
        "self.target_blocks[level](t, real).detach()",
        in_a_step(methods.test_fkd_trains_a_module_on_the_teachers_side_and_nothing_is_idle),
    ),
    "FKD: gathered from the padding": (
        "terms/non_local.py", "(self.g(x) * real)", "self.g(x)",
        plain(parity.test_non_local_block, True),
    ),
    "FKD: sum instead of mean over cells": (
        "terms/non_local.py", "keys.transpose(1, 2)) / number", "keys.transpose(1, 2))",
        plain(parity.test_non_local_block, False),
    ),
    "FKD: keys and values swapped": (
        "terms/non_local.py", "torch.bmm(values, keys.transpose(1, 2))",
        "torch.bmm(keys, values.transpose(1, 2))", plain(parity.test_non_local_block, False),
    ),
    # -- class scores and boxes
    "BCE: the weight is forgotten": (
        "losses/weighted_bce.py", "if beta:", "if False:",
        plain(properties.test_golden_weighted_bce),
    ),
    "BCE: sides swapped": (
        "losses/weighted_bce.py", "p = torch.sigmoid(wide(teacher))",
        "p = torch.sigmoid(s)\n        s = wide(teacher) + 0 * s",
        plain(properties.test_golden_weighted_bce),
    ),
    "BCE: no gradient through the weight": (
        "losses/weighted_bce.py", "(torch.sigmoid(s) - p)", "(torch.sigmoid(s.detach()) - p)",
        plain(properties.test_gradcheck, "BCE"),
    ),
    "GIoU: without the hull": (
        "losses/generalized_iou.py", " - (hull - union) / hull.clamp_min(_SMALLEST)", "",
        plain(parity.test_generalized_iou),
    ),
    "GIoU: the union counts the common twice": (
        "losses/generalized_iou.py", "(by1 - by0) - common", "(by1 - by0)",
        plain(properties.test_generalized_iou_of_known_boxes),
    ),
    "boxes: the overlap instead of what lacks": (
        "terms/logit_box.py", "level: 1 - generalized_iou", "level: generalized_iou",
        in_a_step(scores.test_boxes_pull_at_the_students_deltas_alone),
    ),
    "boxes: the teacher learns": (
        "terms/logit_box.py", "with torch.no_grad():\n            given",
        "if True:\n            given",
        in_a_step(scores.test_boxes_pull_at_the_students_deltas_alone),
    ),
    "boxes: one score for the other": (
        "terms/logit_box.py", 'self.box_score == "teacher"', 'self.box_score == "gap"',
        in_a_step(scores.test_boxes_count_by_the_gap_of_the_scores_or_the_teachers),
    ),
    "boxes: classes as anchors": (
        "terms/logit_box.py", ".unflatten(1, (like.shape[1], -1)).amax(2)",
        ".unflatten(1, (-1, like.shape[1])).amax(1)",
        in_a_step(scores.test_boxes_count_by_the_gap_of_the_scores_or_the_teachers),
    ),
    "boxes: another level's": (
        "terms/logit_box.py", "distances[level]  # (N", "distances['p3']  # (N",
        in_a_step(scores.test_a_level_left_out_is_left_out_of_the_boxes_too),
    ),
    # -- signs, levels and detached sides that the others leave out
    "AT: sign": (
        "losses/attention_transfer.py", "weights) - target", "weights) + target", GOLDEN_AT,
    ),
    "AT: another level": (
        "terms/at.py", "yield level, energy(s, self.p), t", "yield 'p3', energy(s, self.p), t",
        in_a_step(LEVELS, methods.AT),
    ),
    "PI: sign": (
        "losses/predictions.py", "else log_p - log_q", "else log_q - log_p", GOLDEN_PI,
    ),
    "PI sigmoid: no tau^2": (
        "losses/predictions.py", "return tau**2 * value", "return value",
        plain(properties.test_pixel_wise_gradient_closed_form),
    ),
    "PI: a level is dropped": (
        "terms/anchor_classes.py", "in self.aligned(student, target, context)",
        "in list(self.aligned(student, target, context))[1:]", in_a_step(LEVELS, methods.PI),
    ),
    "imitation: sign": (
        "losses/imitation.py", "- wide(teacher.detach())", "+ wide(teacher.detach())",
        plain(properties.test_imitation_of_a_constant_difference),
    ),
    "imitation: the teacher learns": (
        "losses/imitation.py", "teacher.detach()", "teacher",
        plain(TEACHER_IS_CONSTANT, "imitation"),
    ),
    "imitation: the student is detached": (
        "losses/imitation.py", "wide(student)", "wide(student.detach()) + 0 * student",
        plain(properties.test_gradcheck, "imitation"),
    ),
    "channel mean: sign": (
        "losses/channel_mean.py", "- wide(teacher.detach())", "+ wide(teacher.detach())",
        plain(properties.test_golden_channel_distillation),
    ),
    "channel mean: the teacher learns": (
        "losses/channel_mean.py", "teacher.detach()", "teacher",
        plain(TEACHER_IS_CONSTANT, "channel mean"),
    ),
    "PKD: sign": (
        "losses/pearson.py", "eps) - target", "eps) + target", plain(properties.test_golden_pkd),
    ),
    "PKD: the teacher learns": (
        "losses/pearson.py", "with torch.no_grad():", "if True:", plain(TEACHER_IS_CONSTANT, "PKD"),
    ),
    "PKD: statistics are constants": (
        "losses/pearson.py", "var.clamp_min(_SMALLEST)", "var.detach().clamp_min(_SMALLEST)",
        plain(properties.test_gradcheck, "PKD"),
    ),
    "FKD: sign": (
        "losses/root.py", "- teacher.to(wider)", "+ teacher.to(wider)",
        plain(properties.test_golden_fkd),
    ),
    "FKD: another level": (
        "terms/fkd.py", "self.spatial[level](s_mean)", "self.spatial['p3'](s_mean)",
        in_a_step(methods.test_fkd_is_its_four_parts),
    ),
    "FKD: the student is detached": (
        "losses/root.py", "(student.to(wider)", "(student.detach().to(wider) + 0 * student",
        plain(properties.test_gradcheck, "root"),
    ),
    "BCE: sign of the gap": (
        "losses/weighted_bce.py", "(torch.sigmoid(s) - p)", "(torch.sigmoid(s) + p)",
        plain(properties.test_golden_weighted_bce),
    ),
    "BCE: the normaliser is ignored": (
        "losses/weighted_bce.py", "sum_over_cells(per_cell, region) / normalizer",
        "sum_over_cells(per_cell, region)",
        plain(properties.test_a_normalizer_divides_the_sum_over_the_batch, weighted_bce),
    ),
    "BCE: the teacher learns": (
        "losses/weighted_bce.py", "with torch.no_grad():", "if True:",
        plain(TEACHER_IS_CONSTANT, "BCE"),
    ),
    **{
        f"{method.__name__}: another level of the teacher": (
            "terms/levelwise.py", "target[self.source_tap][pair.target.level]",
            "target[self.source_tap][self.pairs[0].target.level]", in_a_step(LEVELS, method),
        )
        for method in methods.METHODS
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fails_its_test(monkeypatch, student, name):
    must_fail(monkeypatch, MUTANTS[name], student)
