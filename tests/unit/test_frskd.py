"""FRSKD: the self-teacher's network by an independent loop, and what its source gives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det import Distiller, terms
from kd_det.sources import FRSKD
from kd_det.sources.bifpn import BiFPN, Fusion
from kd_det.sources.frskd import drawn_anew
from tests.selves import AT, INPUTS, PI, self_cfg
from tests.selves import FRSKD as SELF
from tests.steps import exactly, resumed_step, seeded, step
from tests.toys import batch, toy_fcos

TERMS = {"FPN": AT, "LOGITS": PI}
LOSSES = ("loss_cls", "loss_box_reg")


# The network -------------------------------------------------------------------------------------


def relu_norm(x: Tensor, norm: nn.Module) -> Tensor:
    normed = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return normed.clamp(min=0)


def one_by_one(x: Tensor, block: nn.Sequential) -> Tensor:
    return relu_norm(torch.einsum("oc,nchw->nohw", block[0].weight[:, :, 0, 0], x), block[1])


def conv(x: Tensor, block: nn.Sequential) -> Tensor:
    for k in range(0, len(block), 4):
        x = F.conv2d(x, block[k].weight, padding=1, groups=x.shape[1])
        x = one_by_one(x, block[k + 1 : k + 3])
    return x


def fuse(v: Tensor, *maps: Tensor) -> Tensor:
    v = v.clamp(min=0)
    return sum(v[k] / (v.sum() + 1e-6) * x for k, x in enumerate(maps))


def nearest(x: Tensor, like: Tensor) -> Tensor:
    """Every cell four times, cut off where a side is odd."""
    h, w = like.shape[-2:]
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :h, :w]


def transcribed(net: BiFPN, f: list[Tensor]) -> list[Tensor]:
    """As the paper draws it, for four levels, each node in its own line."""
    l1, l2, l3, l4 = (one_by_one(x, b) for x, b in zip(f, net.lateral, strict=True))
    s2, s3, s4 = (one_by_one(x, b) for x, b in zip(f[1:], net.skip, strict=True))
    u = [x.weight for x in net.up_fusion]
    d = [x.weight for x in net.down_fusion]
    pool = nn.MaxPool2d(3, 2, 1)
    p3 = conv(fuse(u[2], l3, nearest(one_by_one(l4, net.up[2]), l3)), net.up_conv[2])
    p2 = conv(fuse(u[1], l2, nearest(one_by_one(p3, net.up[1]), l2)), net.up_conv[1])
    t1 = conv(fuse(u[0], l1, nearest(one_by_one(p2, net.up[0]), l1)), net.up_conv[0])
    t2 = conv(fuse(d[0], s2, p2, one_by_one(pool(t1), net.down[0])), net.down_conv[0])
    t3 = conv(fuse(d[1], s3, p3, one_by_one(pool(t2), net.down[1])), net.down_conv[1])
    t4 = conv(fuse(d[2], s4, one_by_one(pool(t3), net.down[2])), net.down_conv[2])
    return [t1, t2, t3, t4]


def test_the_pyramid_is_the_paper_s_drawing() -> None:
    net = BiFPN([3, 4, 5, 6], [6, 8, 10, 12]).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    sizes = [(12, 13), (6, 7), (3, 4), (2, 2)]  # odd sides too
    channels = [3, 4, 5, 6]
    maps = [torch.randn(2, c, *s).double() for c, s in zip(channels, sizes, strict=True)]
    found = net(maps)
    torch.testing.assert_close(found, transcribed(net, maps))
    # Every weight takes part: no link is missing.
    sum((x * torch.randn_like(x)).sum() for x in found).backward()
    assert all(torch.count_nonzero(p.grad) for p in net.parameters())


def test_weights_of_a_sum_are_positive_and_sum_to_one() -> None:
    fusion = Fusion(3)
    torch.testing.assert_close(fusion.weights(), torch.full((3,), 1 / 3))
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor([3.0, -2.0, 1.0]))
    weights = fusion.weights()
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 0.25]))
    assert abs(1 - float(weights.sum().detach())) < 1e-6
    ones = [torch.full((1, 2, 3, 3), x) for x in (1.0, 10.0, 5.0)]
    torch.testing.assert_close(fusion(ones), torch.full((1, 2, 3, 3), 2.0))
    with torch.no_grad():
        fusion.weight.fill_(-1.0)
    assert torch.equal(fusion.weights(), torch.zeros(3))  # and no division by 0


def test_a_head_drawn_anew_has_the_same_numbers_elsewhere() -> None:
    model = seeded(self_cfg(SELF, TERMS))
    old, new = model.student.head, drawn_anew(model.student.head)
    for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
        assert torch.equal(a, b) == ("bias" in name)
        assert b.requires_grad


# The source --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return seeded(self_cfg(SELF, TERMS)).train()


def gradients(model: Any, losses: dict[str, Tensor], *names: str) -> dict[str, Tensor | None]:
    named = dict(model.named_parameters())
    total = sum(losses[name] for name in names)
    found = torch.autograd.grad(total, named.values(), retain_graph=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


def test_terms_move_the_student_alone_and_its_loss_moves_both(model: Any) -> None:
    given: list[Any] = []
    handle = model.sources["self"].register_forward_hook(lambda *args: given.append(args[-1]))
    losses = step(model, 0, INPUTS)
    handle.remove()
    # Not only by the grace of these terms, which need no gradient of a target.
    assert not any(x.requires_grad for maps in given[0].maps.values() for x in maps.values())
    assert set(losses) == {
        "loss_cls", "loss_box_reg", "loss_cls_self", "loss_box_reg_self", "loss_kd_fpn",
        "loss_kd_logits",
    }  # fmt: skip
    by_terms = gradients(model, losses, "loss_kd_fpn", "loss_kd_logits")
    assert all(g is None for k, g in by_terms.items() if k.startswith("sources."))
    assert torch.count_nonzero(by_terms["student.backbone.fpn_output3.weight"])
    assert torch.count_nonzero(by_terms["student.head.cls_score.weight"])
    by_own = gradients(model, losses, "loss_cls_self", "loss_box_reg_self")
    assert torch.count_nonzero(by_own["student.backbone.fpn_output3.weight"])
    assert by_own["student.head.cls_score.weight"] is None
    assert all(g is not None for k, g in by_own.items() if k.startswith("sources."))
    model.sources["self"].detach_input = True
    losses = step(model, 1, INPUTS)
    model.sources["self"].detach_input = False
    by_own = gradients(model, losses, "loss_cls_self", "loss_box_reg_self")
    assert all(g is None for k, g in by_own.items() if k.startswith("student."))


def test_with_idle_terms_the_loss_is_the_sum_of_two_task_losses() -> None:
    ramp = {"SCHEDULE": {"TYPE": "Ramp"}}
    model = seeded(self_cfg(SELF, {k: {**v, **ramp} for k, v in TERMS.items()})).train()
    source = model.sources["self"]
    losses = step(model, 0, INPUTS)  # a ramp begins at 0
    assert float(losses["loss_kd_fpn"]) == float(losses["loss_kd_logits"]) == 0
    normalizer = model.student.loss_normalizer
    with torch.no_grad():
        fresh = seeded(self_cfg(SELF, TERMS)).train().student
        features = fresh.backbone(fresh.preprocess_image(INPUTS).tensor)
        levels = source.bifpn([features[f] for f in fresh.head_in_features])
        levels = [bridge(x) for bridge, x in zip(source.bridges, levels, strict=True)]
        instances = [x["instances"] for x in INPUTS]
        with EventStorage(0) as storage:
            plain = fresh(INPUTS)
            counted = storage.latest()["num_pos_anchors"][0] * len(INPUTS)
            assert fresh.loss_normalizer == normalizer  # the second loss did not count
            own = fresh.forward_training(None, levels, source.head(levels), instances)
    assert fresh.loss_normalizer == pytest.approx(0.9 * normalizer + 0.1 * counted)
    expected = sum(plain.values()) + sum(own.values())
    torch.testing.assert_close(sum(losses.values()).detach(), expected)
    # What moves the student then is the same as by these two losses alone.
    zero = gradients(model, losses, "loss_kd_fpn", "loss_kd_logits")
    assert all(g is None or not torch.count_nonzero(g) for g in zero.values())


def test_it_leaves_the_students_own_losses_and_weights_alone(model: Any) -> None:
    plain = seeded(self_cfg(SELF, TERMS)).student.train()
    model = seeded(self_cfg(SELF, TERMS)).train()
    exactly(dict(plain.state_dict()), dict(model.state_dict()))
    for i in range(2):
        losses = step(model, i, INPUTS)
        with EventStorage(i):
            own = plain(INPUTS)
        exactly({k: losses[k] for k in LOSSES}, own)
    assert model.student.loss_normalizer == plain.loss_normalizer
    exactly(dict(plain.state_dict()), dict(model.state_dict()))


def test_once_its_terms_are_over_it_rests() -> None:
    short = {"SCHEDULE": {"TYPE": "Constant", "STOP_ITER": 5}}
    model = seeded(self_cfg(SELF, {k: {**v, **short} for k, v in TERMS.items()})).train()
    assert "loss_cls_self" in resumed_step(model, 4, INPUTS)
    losses = step(model, 5, INPUTS)
    assert "loss_cls_self" not in losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("unlabelled", [1, 2])
def test_images_without_labels_are_refined_and_cost_nothing(unlabelled: int) -> None:
    inputs = batch(((64, 64), (64, 64)))
    for x in inputs[:unlabelled]:
        del x["instances"]
    pi = {**PI, "NORMALIZER": "cells"}  # an all unlabelled first batch has counted no anchors
    model = seeded(self_cfg(SELF, {"FPN": AT, "LOGITS": pi})).train()
    losses = step(model, 0, inputs)
    assert (float(losses["loss_cls_self"].detach()) == 0) == (unlabelled == 2)
    assert float(losses["loss_kd_fpn"].detach()) > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.sources.parameters())


def test_stages_of_the_bottom_up_network_with_a_head_on_coarser_levels_too() -> None:
    stages = {"SELF": {"TYPE": "FRSKD", "INPUTS": ["backbone.bottom_up"], "WIDTH": 0.5}}
    hint = {"TYPE": "FitNet", "TAP": "backbone.bottom_up", "SOURCE_TAP": "refined"}
    model = seeded(self_cfg(stages, {"FPN": hint, "LOGITS": PI})).train()
    source = model.sources["self"]
    refined = source.shapes(("refined",))["refined"]
    assert [(s.level, s.channels, s.stride) for s in refined] == [
        ("res3", 4, 8), ("res4", 8, 16), ("res5", 16, 32),
    ]  # fmt: skip
    losses = step(model, 0, INPUTS)
    assert [row.level for row in model.wiring.rows["fpn"]] == ["res3", "res4", "res5"]
    sum(losses.values()).backward()
    assert all(torch.count_nonzero(p.grad) for p in source.bridges.parameters())


def test_an_fcos_has_its_centerness_twice() -> None:
    fpn = terms.AT(tap="features", source_tap="refined")
    model = Distiller(student=toy_fcos(), sources={"self": FRSKD(width=1)}, terms={"fpn": fpn})
    losses = step(model.train(), 0, INPUTS)
    assert {k for k in losses if k.endswith("_self")} == {
        f"{k}_self" for k in losses if not k.endswith("_self") and "kd" not in k
    }
    assert "loss_fcos_ctr_self" in losses


@pytest.mark.parametrize(("source", "words"), [
    ({"INPUTS": ["res4"]}, r"two levels or more.*INPUTS res4 are res4 \(stride 16\)"),
    ({"INPUTS": ["res3", "res5"]}, r"res3 \(stride 8\), res5 \(stride 32\)"),
    ({"INPUTS": ["res4", "res5"]}, r"reads level p3 \(stride 8\).*add it to them"),
    ({"WIDTH": 0.0}, "finite width > 0"),
    ({"DEPTH": 0}, "depth 0"),
])  # fmt: skip
def test_errors_of_its_fields(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        seeded(self_cfg({"SELF": {"TYPE": "FRSKD", **source}}, {"LOGITS": PI}))


def test_a_two_stage_student_and_a_wrong_tap_are_errors() -> None:
    with pytest.raises(ValueError, match="Source 'self': GeneralizedRCNN has no dense head"):
        seeded(self_cfg(SELF, {"FPN": AT}, arch="GeneralizedRCNN"))
    with pytest.raises(KeyError, match=r"FRSKD has no tap features: only .*refined"):
        seeded(self_cfg(SELF, {"FPN": {**AT, "SOURCE_TAP": "features"}}))
