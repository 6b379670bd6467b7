"""A test of the tests of OKDCR, as `tests.unit.test_method_mutants` is of the other methods."""

import pytest

from tests.lone_terms import toy_student
from tests.parity import test_okdcr_parity as parity
from tests.unit import test_consistency as consistency
from tests.unit import test_ensemble as ensemble
from tests.unit.test_method_mutants import must_fail

LOSS = "losses/consistency.py"
SCORES = "losses/class_scores.py"
TERM = "terms/consistency.py"
SOURCE = "sources/ensemble.py"


def plain(check, *args):
    return lambda student: check(*args)


def term(**options):
    check = consistency.test_the_term_asks_for_both_sides_and_tells_the_loss_all
    return lambda student: check(student, options)


def parity_of(mode="sigmoid", kind="all"):
    return plain(parity.test_consistency_is_the_transcription, mode, kind)


ENSEMBLE = plain(parity.test_the_ensemble_and_its_imitation_are_the_transcription, "sigmoid")
BY_HAND = plain(consistency.test_the_mean_over_classes_and_the_sum_over_anchors)
UNIFORM = plain(consistency.test_identical_heads_have_uniform_weights, "sigmoid")
SUM_TO_ONE = plain(consistency.test_weights_sum_to_one, "sigmoid")
MEMBERS = plain(ensemble.test_a_level_is_the_ensemble_of_its_members, "softmax")

MUTANTS = {
    # -- the distance
    "the sum over classes": (LOSS, "gap.abs().mean(2,", "gap.abs().sum(2,", BY_HAND),
    "squares": (LOSS, "gap.abs()", "gap.square()", BY_HAND),
    "no absolute": (LOSS, "gap.abs()", "gap", BY_HAND),
    "the mean over anchors": (LOSS, "mode, classes).sum(1)", "mode, classes).mean(1)", BY_HAND),
    "one side is a constant": (
        LOSS, "- probabilities(b,", "- probabilities(b.detach(),",
        plain(consistency.test_it_is_symmetric_and_moves_both, "sigmoid"),
    ),
    "the other side is": (
        LOSS, "gap = probabilities(a,", "gap = probabilities(a.detach(),",
        plain(consistency.test_it_is_symmetric_and_moves_both, "sigmoid"),
    ),
    "the region is ignored": (
        LOSS, "return mean_over_images(cells, region)", "return mean_over_images(cells)",
        parity_of(kind="weights"),
    ),
    "the normaliser is ignored": (
        LOSS, "sum_over_cells(cells, region) / normalizer", "sum_over_cells(cells, region)",
        parity_of(),
    ),
    "modes swapped": (SCORES, 'mode == "softmax"', 'mode == "sigmoid"', parity_of()),
    "softmax over anchors": (SCORES, "z.softmax(2)", "z.softmax(1)", parity_of("softmax")),
    "classes as anchors": (
        SCORES, "logits.unflatten(1, (-1, classes or channels))",
        "logits.unflatten(1, (classes or channels, -1)).transpose(1, 2)", parity_of("softmax"),
    ),
    "half precision stays": (
        SCORES, "by_anchor(wide(logits), classes)", "by_anchor(logits, classes)",
        plain(consistency.test_half_precision_is_computed_in_float32, "consistency",
              consistency.torch.bfloat16),
    ),
    # -- the ensemble
    "who disagrees counts more": (LOSS, "(-torch.stack", "(torch.stack", ENSEMBLE),
    "weights do not sum to one": (LOSS, ".softmax(0)", ".exp()", SUM_TO_ONE),
    "weights over anchors": (LOSS, ".softmax(0)", ".softmax(2)", SUM_TO_ONE),
    "without the factor 1/2": (
        LOSS, "(wide(first) + wide(second)) / 2", "(wide(first) + wide(second))", UNIFORM,
    ),
    "the second head is left out": (
        LOSS, "(wide(first) + wide(second)) / 2", "wide(first)", ENSEMBLE,
    ),
    "the last peer alone": (LOSS, "total += (w", "total = (w", SUM_TO_ONE),
    "uniform weights": (LOSS, "w * by_anchor(", "w.mean() * by_anchor(", ENSEMBLE),
    "one weight for all anchors": (
        LOSS, "(w * by_anchor", "(w.mean(1, keepdim=True) * by_anchor", ENSEMBLE,
    ),
    "the ensemble learns": (
        LOSS, "    distances = [", "    torch.set_grad_enabled(True)\n    distances = [",
        plain(consistency.test_the_ensemble_is_a_constant),
    ),
    "one head alone counts as disagreement": (
        LOSS, "torch.zeros_like(by_anchor", "torch.ones_like(by_anchor", UNIFORM,
    ),
    # -- the term
    "the term's classes are not told": (
        "terms/anchor_classes.py", "self.classes.get(level, 0)", "0", term(),
    ),
    "its mode is not told": (TERM, "mode=self.mode, classes", "classes", term(mode="softmax")),
    "its region is not told": (TERM, "region=region, ", "", term()),
    "its normaliser is not told": (
        TERM, "normalizer=normalizer\n", "normalizer=None\n", term(normalizer="positives"),
    ),
    "its target is a constant": (
        TERM, "student, target, mode", "student, target.detach(), mode", term(),
    ),
    # -- the source
    "second heads in another order": (
        SOURCE, "seconds = self.second_heads or", "seconds = self.second_heads[::-1] or", MEMBERS,
    ),
    "second heads are forgotten": (SOURCE, "seconds = self.second_heads or", "seconds =", MEMBERS),
    "another mode": (SOURCE, "            mode=self.mode,\n", "", MEMBERS),
    "another number of classes": (SOURCE, "classes=shape.per_anchor", "classes=0", MEMBERS),
    "another level": (SOURCE, "of[shape.level] for", "of['p7'] for", MEMBERS),
}  # fmt: skip


@pytest.fixture(scope="module")
def student():
    return toy_student()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fails_its_test(monkeypatch, student, name):
    must_fail(monkeypatch, MUTANTS[name], student)
