"""Folding BatchNorm: the folded network computes the same, and what cannot be folded is named."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from kd_det.sources.fold import fold_batch_norm
from tests import toys

IMAGE = torch.rand(2, 3, 6, 6)


def lively(norm):
    """Statistics and parameters as training leaves them."""
    for name, low, high in [
        ("running_mean", -1, 1),
        ("running_var", 0.2, 3),
        ("weight", -2, 2),
        ("bias", -1, 1),
    ]:
        x = getattr(norm, name, None)
        if x is not None:
            x.data.uniform_(low, high)
    return norm


def wrapped(norm, bias=False, activation=None):
    return Conv2d(3, 4, 3, padding=1, bias=bias, norm=lively(norm), activation=activation)


class CustomSequential(nn.Sequential):
    """Runs its children backwards."""

    def forward(self, x):
        for module in reversed(list(self)):
            x = module(x)
        return x


NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d eps": lambda: nn.BatchNorm2d(4, eps=0.1),
    "BatchNorm2d no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "NaiveSyncBN": lambda: get_norm("naiveSyncBN", 4),
}


def check(model, folded, left, keep=()):
    """Fold, and compare the paths and the outputs in eval mode."""
    model = model.eval()
    twin = copy.deepcopy(model)
    found = fold_batch_norm(model, keep)
    assert found == (folded, left)
    with torch.no_grad():
        assert_close(model(IMAGE), twin(IMAGE))
    # None of the tests is about folds that change nothing.
    if folded:
        assert model.state_dict().keys() != twin.state_dict().keys()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_detectron2s_convolution(norm, bias):
    check(nn.Sequential(wrapped(NORMS[norm](), bias, nn.ReLU())), ["0.norm"], [])


@pytest.mark.parametrize("norm", NORMS)
def test_norm_behind_a_convolution_in_a_sequential(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), lively(NORMS[norm]()), nn.ReLU())
    check(model, ["1"], [])


def test_paths_are_dotted_from_the_model():
    model = nn.Sequential(wrapped(nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model[1].insert(1, lively(nn.BatchNorm2d(4)))
    check(model, ["0.norm", "1.1"], [])


def test_grouped_and_strided_convolutions():
    norm = lively(nn.BatchNorm2d(6))
    check(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3), norm), ["1"], [])


# -- what is left alone ---------------------------------------------------------------------------


def test_a_norm_of_two_convolutions_is_left_alone_and_named():
    norm = lively(nn.BatchNorm2d(4))
    first = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    second = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    check(nn.Sequential(first, second), [], ["0.1"])


def test_a_convolution_that_is_used_twice_in_one_sequential_is_left_alone():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, lively(nn.BatchNorm2d(3)), conv, lively(nn.BatchNorm2d(3)))
    check(model, [], ["1", "3"])


def test_a_convolution_that_is_used_elsewhere_is_left_alone():
    conv = wrapped(nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Sequential(conv), nn.Conv2d(4, 3, 1), nn.Sequential(conv))
    check(model, [], ["0.0.norm"])


def test_convolutions_that_share_a_weight_do_not_share_a_fold():
    first, second = (nn.Conv2d(3, 3, 1) for _ in range(2))
    second.weight = first.weight
    model = nn.Sequential(
        first, lively(nn.BatchNorm2d(3)), nn.ReLU(), second, lively(nn.BatchNorm2d(3))
    )
    check(model, ["1", "4"], [])


def test_a_block_that_is_used_twice_is_folded_once():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), lively(nn.BatchNorm2d(3)))
    check(nn.Sequential(block, nn.ReLU(), block), ["0.1"], [])


def test_without_running_statistics_there_is_nothing_to_fold():
    check(nn.Sequential(wrapped(nn.BatchNorm2d(4, track_running_stats=False))), [], ["0.norm"])


def test_a_sequential_with_a_forward_of_its_own_is_left_alone():
    model = CustomSequential(nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(3)))
    check(model, [], ["1"])


def test_a_norm_before_a_convolution_or_behind_an_activation_is_left_alone():
    before = nn.Sequential(lively(nn.BatchNorm2d(3)), nn.Conv2d(3, 4, 1))
    check(before, [], ["0"])
    behind = nn.Sequential(
        Conv2d(3, 4, 1, activation=nn.ReLU()), lively(nn.BatchNorm2d(4)), nn.ReLU()
    )
    check(behind, [], ["1"])
    both = nn.Sequential(wrapped(nn.BatchNorm2d(4)), lively(nn.BatchNorm2d(4)))
    model = both.eval()
    twin = copy.deepcopy(model)
    folded, left = fold_batch_norm(model)
    assert "0.norm" in folded
    assert folded + left in (["0.norm", "1"], ["1", "0.norm"])
    assert_close(model(IMAGE), twin(IMAGE))


@pytest.mark.parametrize("kept", ["0", "1"])
def test_a_tapped_norm_or_convolution_of_a_sequential_is_kept(kept):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(4)))
    check(model, [], ["1"], keep=[kept])


def test_a_tapped_norm_of_detectron2s_convolution_is_kept_but_its_convolution_may_be_tapped():
    model = nn.Sequential(wrapped(nn.BatchNorm2d(4)))
    check(copy.deepcopy(model), [], ["0.norm"], keep=["0.norm"])
    check(model, ["0.norm"], [], keep=["0"])


def test_norms_of_other_kinds_are_left_alone():
    check(nn.Sequential(wrapped(nn.GroupNorm(2, 4))), [], [])


# -- whole detectors ------------------------------------------------------------------------------


def batch_norms(model):
    kinds = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    return [m for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_a_detector_folds_completely(norm):
    model = build_model(toys.toy_cfg(norm=norm)).eval().requires_grad_(False)
    norms = batch_norms(model)
    assert len(norms) > 50  # a ResNet-50
    for m in norms:
        lively(m)
        m.weight.uniform_(0.5, 1)  # keeps the numbers in range over so many layers
    twin = copy.deepcopy(model)
    folded, left = fold_batch_norm(model)
    assert len(folded) == len(norms)
    assert batch_norms(model) == []
    assert left == []
    image = torch.rand(1, 3, 128, 128)
    ours, theirs = (m.head(list(m.backbone(image).values())) for m in (model, twin))
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_norms_of_a_shared_head_are_left_alone_and_named():
    cfg = toys.toy_cfg()
    cfg.MODEL.RETINANET.NORM = "BN"  # CycleBatchNormList: other statistics for each level
    model = build_model(cfg).eval()
    for m in batch_norms(model):
        m.running_mean.normal_(0, 0.3)
        m.running_var.uniform_(0.5, 2)
    twin = copy.deepcopy(model)
    folded, left = fold_batch_norm(model)
    assert len(folded) == len(batch_norms(twin.backbone))
    assert len(left) == len(batch_norms(twin.head)) > 0
    assert all(name.startswith("head.") for name in left)
    with torch.no_grad():
        features = list(model.backbone(torch.rand(1, 3, 128, 128)).values())
        ours, theirs = model.head(features), twin.head(features)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_close(a, b, atol=0, rtol=0)
