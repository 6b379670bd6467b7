"""Losses of the published methods: golden values, properties, gradients, extremes."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd_det.losses import (
    attention_transfer,
    channel_mean,
    channel_wise_kl,
    generalized_iou,
    imitation,
    pearson_distance,
    pixel_wise_kl,
    root,
    root_of_squares,
    weighted_bce,
)
from tests.unit.test_channel_wise_kl import golden, random_pair

LOSSES = {
    "AT": attention_transfer,
    "PI": pixel_wise_kl,
    "PI sigmoid": lambda s, t, **kw: pixel_wise_kl(s, t, mode="sigmoid", **kw),
    "imitation": imitation,
    "channel mean": channel_mean,
    "PKD": pearson_distance,
    "BCE": weighted_bce,
    "root": lambda s, t, region=None: root_of_squares(s, t, region),
}
MEANS = [name for name in LOSSES if name not in ("PKD", "root")]  # over images


def value_and_grad(loss, student, teacher, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher, **kwargs)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def near(found, value, atol=1e-12):
    assert_close(float(found), value, atol=atol, rtol=0)


# -- golden values: sources stand beside them ------------------------------------------------------


def test_golden_attention_transfer():
    near(attention_transfer(*golden()), 0.0208353287758)  # attention-transfer, FRSKD


def test_golden_pixel_wise():
    value = float(pixel_wise_kl(*golden()))
    near(value, 0.3031850552683)  # TorchDistiller "spatial", FRSKD-seg: / (N M)
    near(value / 3, 0.1010617, 1e-7)  # TorchDistiller CriterionKD: / (N C M)
    cross_entropy = float(pixel_wise_kl(*golden(), cross_entropy=True))
    near(2 * cross_entropy, 2.3721882, 1e-7)  # SKD CriterionPixelWise: / M, not / N


def test_golden_channel_distillation():
    near(channel_mean(*golden()), 0.0506839539287)  # its own repository, TorchDistiller


def test_golden_pkd():
    near(pearson_distance(*golden()), 0.7654847672957)  # mmrazor
    s, t = golden()
    rows = [x.transpose(0, 1).flatten(1) for x in (s, t)]  # (C, n)
    r = torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(*rows, strict=True)])
    near(pearson_distance(s, t, eps=0.0), 39 / 40 * float(1 - r.mean()))
    near(pearson_distance(s, t, eps=0.0), 0.7654866902, 1e-10)


def test_golden_weighted_bce():
    near(weighted_bce(*golden(), normalizer=1.0), 18.0936149948792)  # CrossKD and BCKD, a sum


def test_golden_fkd():
    s, t = golden()
    attention = sum((x.abs().mean(1) / 0.5).flatten(1).softmax(1) for x in (s, t)) / 2 * 20
    near(root_of_squares(s, t, attention.view(2, 1, 4, 5)), 11.094413, 1e-6)
    near(root_of_squares(s.mean((2, 3)), t.mean((2, 3))), 0.551456, 1e-6)
    near(root_of_squares(s.mean(1), t.mean(1)), 3.675327, 1e-6)


# -- what all have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    student, teacher = random_pair((2, 3, 2, 3))
    region = torch.rand(2, 1, 2, 3, dtype=torch.float64)
    region[0, 0, 0] = 0
    for kwargs in ({}, {"region": region}):

        def loss(x, kwargs=kwargs):
            return LOSSES[name](x, teacher, **kwargs)

        assert torch.autograd.gradcheck(loss, student.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_zero_and_flat_where_both_agree(name):
    student, _ = random_pair()
    value, grad = value_and_grad(LOSSES[name], student, student.clone())
    assert abs(value) < 1e-12
    assert grad.abs().max() < (1 if name == "root" else 1e-12)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "root"])
def test_the_teacher_and_the_region_are_constants(name):
    student, teacher = random_pair()
    region = torch.ones(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    student.requires_grad_()
    teacher.requires_grad_()
    LOSSES[name](student, teacher, region=region).backward()
    assert teacher.grad is None
    assert region.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_region_zero_equals_the_cropped_map(name):
    student, teacher = random_pair()
    region = torch.zeros(2, 1, 4, 5, dtype=torch.float64)
    region[..., :3, :2] = 1
    student[..., 3:, :] = 1e4  # what is left out may hold anything finite
    teacher[..., :, 2:] = -1e4
    value, grad = value_and_grad(LOSSES[name], student, teacher, region=region)
    cropped, cropped_grad = value_and_grad(LOSSES[name], student[..., :3, :2], teacher[..., :3, :2])
    assert_close(value, cropped)
    assert_close(grad[..., :3, :2], cropped_grad)
    assert_close(grad * (1 - region), torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_region_is_exactly_zero_and_attached(name, dtype):
    student, teacher = random_pair(dtype=dtype)
    value, grad = value_and_grad(
        lambda s, t, **kw: 1e4 * LOSSES[name](s, t, **kw),
        student,
        teacher,
        region=torch.zeros(2, 1, 4, 5),
    )
    assert value.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", MEANS)
def test_an_image_more_of_the_same_changes_nothing(name):
    student, teacher = random_pair()
    region = torch.rand(2, 1, 4, 5, dtype=torch.float64)
    for kwargs in ({}, {"region": region}):
        double = {k: torch.cat([x, x]) for k, x in kwargs.items()}
        assert_close(
            LOSSES[name](torch.cat([student] * 2), torch.cat([teacher] * 2), **double),
            LOSSES[name](student, teacher, **kwargs),
        )


@pytest.mark.parametrize(
    ("name", "factor"),
    [("AT", 1 / 4), ("PI", 1), ("imitation", 1), ("channel mean", 1), ("BCE", 1), ("root", 2)],
)
def test_tiling_the_grid_by_four(name, factor):
    student, teacher = random_pair()
    tiled = LOSSES[name](student.tile(1, 1, 2, 2), teacher.tile(1, 1, 2, 2))
    assert_close(tiled, factor * LOSSES[name](student, teacher))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype, layout):
    student, teacher = random_pair(dtype=dtype)
    expected, slope = value_and_grad(LOSSES[name], student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = value_and_grad(
            LOSSES[name], student.to(memory_format=layout), teacher.to(memory_format=layout)
        )
    assert value.dtype == torch.float32
    assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert grad.dtype == dtype
    assert_close(grad.double(), slope, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("pattern", ["large", "opposite", "constant", "zero"])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_stay_finite(name, pattern):
    student, teacher = random_pair(dtype=torch.float32)
    if pattern == "large":
        student, teacher = 1e4 * student.sign(), 1e4 * teacher.sign()
    elif pattern == "opposite":
        student, teacher = torch.full_like(student, 1e4), torch.full_like(teacher, -1e4)
    elif pattern == "constant":
        student = torch.full_like(student, 1234.5)
    else:
        student = torch.zeros_like(student)
    value, grad = value_and_grad(LOSSES[name], student, teacher)
    assert math.isfinite(value)
    assert value >= 0
    assert grad.isfinite().all()


# -- one by one ------------------------------------------------------------------------------------


def test_attention_minds_neither_scale_nor_sign():
    student, teacher = random_pair()
    scale = torch.tensor([3.0, 0.01], dtype=torch.float64).view(2, 1, 1, 1)
    near(attention_transfer(scale * student, student), 0.0)
    signs = torch.randn_like(student).sign()
    assert_close(attention_transfer(signs * student, teacher), attention_transfer(student, teacher))


def test_attention_of_other_channels_needs_no_connector():
    student, teacher = random_pair()
    doubled = torch.cat([student, student], 1)
    near(attention_transfer(doubled, student), 0.0)
    assert attention_transfer(doubled, teacher) > 0.01


def test_attention_is_weaker_on_larger_maps_unless_summed():
    student, teacher = random_pair()
    tiled = [x.tile(1, 1, 2, 2) for x in (student, teacher)]
    summed = attention_transfer(student, teacher, over_cells="sum")
    assert_close(summed, 20 * attention_transfer(student, teacher))
    assert_close(attention_transfer(*tiled, over_cells="sum"), summed)
    one, other = torch.zeros(2, 1, 1, 4, 5)
    one[..., 0, 0] = other[..., 3, 4] = 1
    near(attention_transfer(one, other), 2 / 20, 1e-7)  # the bound


def test_pixel_wise_gradient_closed_form():
    student, teacher = golden()
    for tau in (1.0, 4.0):
        _, grad = value_and_grad(pixel_wise_kl, student, teacher, tau=tau)
        q, p = ((x / tau).softmax(1) for x in (student, teacher))
        assert_close(grad, tau * (q - p) / 40)
        _, grad = value_and_grad(pixel_wise_kl, student, teacher, tau=tau, mode="sigmoid")
        q, p = ((x / tau).sigmoid() for x in (student, teacher))
        assert_close(grad, tau * (q - p) / 40)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_cross_entropy_has_the_gradient_of_the_divergence_and_another_value(mode):
    student, teacher = golden()
    value, grad = value_and_grad(pixel_wise_kl, student, teacher, mode=mode)
    other, same = value_and_grad(pixel_wise_kl, student, teacher, mode=mode, cross_entropy=True)
    assert_close(same, grad)
    assert other > value + 0.1


def test_softmax_does_not_see_a_constant_over_classes_and_sigmoid_does():
    student, teacher = random_pair()
    moved = student + torch.randn(2, 1, 4, 5, dtype=torch.float64)
    assert_close(pixel_wise_kl(moved, teacher), pixel_wise_kl(student, teacher))
    near(pixel_wise_kl(moved, student), 0.0)
    assert pixel_wise_kl(moved, student, mode="sigmoid") > 0.01


def test_anchors_have_a_softmax_each():
    student, teacher = random_pair((2, 6, 4, 5))
    parts = [pixel_wise_kl(student[:, a : a + 2], teacher[:, a : a + 2]) for a in (0, 2, 4)]
    assert_close(pixel_wise_kl(student, teacher, classes=2), sum(parts))
    with pytest.raises(ValueError, match=r"6 channels.*4 classes each"):
        pixel_wise_kl(student, teacher, classes=4)


def test_the_divergence_is_teacher_to_student():
    s = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 2, 1, 1)
    t = torch.zeros_like(s)
    near(pixel_wise_kl(s, t), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    p, q = 0.5, 0.75
    near(
        pixel_wise_kl(s[:, 1:], t[:, 1:], mode="sigmoid"),
        p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
    )


@pytest.mark.parametrize("loss", [pixel_wise_kl, weighted_bce])
def test_a_normalizer_divides_the_sum_over_the_batch(loss):
    student, teacher = random_pair()
    total = loss(student, teacher, normalizer=1.0)
    assert_close(loss(student, teacher, normalizer=8.0), total / 8)
    assert_close(total, 40 * loss(student, teacher))


def test_imitation_of_a_constant_difference():
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    near(imitation(teacher + 2, teacher), 2.0)  # d^2 / 2
    near(imitation(teacher + 2, teacher, over_channels="sum"), 6.0)  # C d^2 / 2
    region = torch.zeros(2, 1, 4, 5)
    region[0, 0, :2, 1] = 0.25
    near(imitation(teacher + 2, teacher, region=region), 2.0)  # however many cells count


def test_channel_means_do_not_see_positions_and_cwd_does():
    student, teacher = random_pair()
    shuffled = student.flatten(2)[..., torch.randperm(20)].view_as(student)
    assert_close(channel_mean(shuffled, teacher), channel_mean(student, teacher))
    a, b = channel_wise_kl(shuffled, teacher), channel_wise_kl(student, teacher)
    assert not math.isclose(a, b, rel_tol=1e-3)


def test_pearson_minds_neither_scale_nor_offset_of_a_channel():
    student, teacher = random_pair()
    scale = torch.tensor([2.0, 0.3, 5.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert_close(
        pearson_distance(scale * student - 7, teacher, eps=0),
        pearson_distance(student, teacher, eps=0),
    )
    near(pearson_distance(-student, student, eps=0), 2 * 39 / 40)  # the largest


def test_pearson_couples_the_images_of_a_batch():
    student, teacher = random_pair()
    apart = [pearson_distance(student[[n]], teacher[[n]]) for n in range(2)]
    assert not math.isclose(sum(apart) / 2, pearson_distance(student, teacher), rel_tol=1e-3)


def test_pearson_of_a_constant_channel_is_zero_even_if_it_is_large():
    _, teacher = random_pair(dtype=torch.float32)
    value, grad = value_and_grad(pearson_distance, torch.full_like(teacher, 1e4 / 3), teacher)
    near(value, 0.5 * 39 / 40, 1e-5)  # what is left is the teacher's
    assert grad.abs().max() < 1e6
    one = torch.ones(1, 3, 1, 1)
    assert value_and_grad(pearson_distance, one, -one)[0] == 0


def test_cross_entropy_is_weighted_by_the_gap():
    s, t = torch.tensor([2.0, -3.0]), torch.tensor([0.5, -3.0])
    s, t = s.view(1, 2, 1, 1), t.view(1, 2, 1, 1)
    p, q = float(t[0, 0].sigmoid()), float(s[0, 0].sigmoid())
    bce = -p * math.log(q) - (1 - p) * math.log(1 - q)
    near(weighted_bce(s, t, normalizer=1), abs(q - p) * bce, 1e-6)  # the second agrees: 0
    near(weighted_bce(s, t, normalizer=1, beta=2), (q - p) ** 2 * bce, 1e-6)
    assert weighted_bce(s, t, beta=0) > weighted_bce(s, t)


def test_generalized_iou_of_known_boxes():
    unit = torch.tensor([0.0, 0, 1, 1])
    far = torch.tensor([2.0, 0, 3, 1])
    half = torch.tensor([0.0, 0, 1, 2])
    near(generalized_iou(unit, unit), 1.0)
    near(generalized_iou(unit, far), -1 / 3, 1e-6)
    near(generalized_iou(unit, half), 0.5)
    empty = torch.zeros(4, requires_grad=True)
    generalized_iou(empty, empty.detach()).backward()
    assert empty.grad.isfinite().all()
    both = torch.stack([unit, far]), torch.stack([half, unit])
    assert_close(generalized_iou(both[0].T, both[1].T, dim=0), generalized_iou(*both))


def test_the_root_has_a_slope_at_zero():
    x = torch.tensor([0.0, 1e-20, 4.0], dtype=torch.float64, requires_grad=True)
    y = root(x)
    assert_close(y.detach(), torch.tensor([0.0, 1e-14, 2.0], dtype=torch.float64))
    y.sum().backward()
    assert_close(x.grad, torch.tensor([1e6, 1e6, 0.25], dtype=torch.float64))


def test_the_root_grows_with_the_batch():
    student, teacher = random_pair()
    four = root_of_squares(torch.cat([student] * 4), torch.cat([teacher] * 4))
    assert_close(four, 2 * root_of_squares(student, teacher))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: attention_transfer(s, t, p=0.5), "finite p >= 1, but got 0.5"),
        (lambda s, t: attention_transfer(s, t, over_cells="max"), "'mean' or 'sum'.*'max'"),
        (lambda s, t: pixel_wise_kl(s, t, mode="tanh"), "softmax, sigmoid.*'tanh'"),
        (lambda s, t: imitation(s, t, over_channels="max"), "'mean' or 'sum'.*'max'"),
        (lambda s, t: weighted_bce(s, t, beta=0.5), "beta is 0 or .* >= 1, but got 0.5"),
    ],
)
def test_wrong_options_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_pair())
