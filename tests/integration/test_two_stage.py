"""Two-stage students and teachers of every kind: steps, boxes, plain losses, files, plans."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det import Distiller
from kd_det.config import student_config
from kd_det.paths import CONFIGS
from kd_det.plan import plan_table
from kd_det.terms import CWD, RPN, BoxHead
from tests.configs import kd_cfg
from tests.steps import exactly, gradients, step
from tests.toys import batch, distiller_cfg, toy_cfg
from tests.two_stage import KINDS, boxes_seen, inputs, lively, pair, rcnn, rcnn_cfg, save_rcnn

TERMS: dict[str, Any] = {
    "BOX": {"TYPE": "BoxHead", "TAU": 1.0, "WEIGHT": 1.0},
    "RPN": {"TYPE": "RPN", "WEIGHT": 1.0},
    "FPN": {"TYPE": "CWD", "TAP": "features"},
}
CASES = [(kind, kind) for kind in KINDS]
CASES += [("faster", "cascade"), ("cascade", "faster"), ("faster", "mask"), ("mask", "faster")]
ACROSS = [("faster", "c4"), ("c4", "cascade")]  # no RPN in common


def rcnn_distiller(student: str, teacher: str) -> nn.Module:
    terms: dict[str, Any] = {"box": BoxHead(), "fpn": CWD(tap="features")}
    if (student, teacher) in ACROSS:
        # p4 of the pyramid and res4 of a C4 are paired: 8 and 16 channels on one grid
        del terms["fpn"]
    else:
        terms["rpn"] = RPN()
    return pair(rcnn(student), rcnn(teacher, seed=5), **terms)


@pytest.mark.parametrize(("student", "teacher"), CASES + ACROSS)
def test_three_steps(student: str, teacher: str) -> None:
    model = rcnn_distiller(student, teacher)
    names = {f"loss_kd_{name}" for name in model.terms}
    model.prepare()
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    boxes_seen(model.student, ours)
    boxes_seen(model.sources["teacher"].hidden.held, theirs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for iteration in range(3):
        losses = step(model, iteration, inputs())
        assert names <= set(losses)
        assert all(torch.isfinite(x) for x in losses.values())
        assert all(float(losses[name].detach()) > 1e-3 for name in names)
        # The very boxes, of the stages that both have.
        assert ours
        assert len(theirs) == min(len(ours), 3 if teacher == "cascade" else 1)
        for a, b in zip(ours, theirs, strict=False):
            exactly(b, a)
        ours.clear()
        theirs.clear()
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(g).all() for g in gradients(model).values())
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_own_losses_are_those_without_distillation(kind: str) -> None:
    student = rcnn(kind).train()
    model = pair(copy.deepcopy(student), rcnn(kind, seed=5))
    model.prepare()
    torch.manual_seed(3)
    plain = step(student, 0, inputs())
    torch.manual_seed(3)
    losses = step(model, 0, inputs())
    exactly({k: losses[k] for k in plain}, plain)
    assert set(losses) - set(plain) == {"loss_kd_box", "loss_kd_rpn"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_teacher_gives_zero_and_no_pull(kind: str) -> None:
    student = rcnn(kind)
    model = pair(student, copy.deepcopy(student))
    losses = step(model, 0, inputs())
    for name in ("loss_kd_box", "loss_kd_rpn"):
        assert float(losses[name].detach()) == pytest.approx(0, abs=1e-6)
    (losses["loss_kd_box"] + losses["loss_kd_rpn"]).backward()
    found = gradients(model)
    assert len(found) > 30
    assert max(float(g.abs().max()) for g in found.values()) < 1e-4


def test_sigmoid_heads_meet_as_such() -> None:
    """Detectron2 main's USE_SIGMOID_CE; in 0.6 nobody reads the attribute but kd_det."""
    student, teacher = rcnn(), rcnn(seed=5)
    for model in (student, teacher):
        model.roi_heads.box_predictor.use_sigmoid_ce = True
    together = pair(student, teacher, box=BoxHead())
    assert together.wiring.rows["box"][0].student_channels == 4
    losses = step(together, 0, inputs())
    assert float(losses["loss_kd_box"].detach()) > 0
    losses["loss_kd_box"].backward()
    background = gradients(student)["roi_heads.box_predictor.cls_score.bias"][-1]
    assert float(background) == 0  # trained by nobody
    with pytest.raises(ValueError, match=r"Term 'box': stage0: .* softmax and those of the source"):
        pair(rcnn(), teacher, box=BoxHead())


def test_what_each_term_moves() -> None:
    model = pair(rcnn(), rcnn(seed=5))
    losses = step(model, 0, inputs())
    losses["loss_kd_box"].backward(retain_graph=True)
    box = gradients(model.student)
    predictor = "roi_heads.box_predictor"
    assert all(
        torch.count_nonzero(box[f"{predictor}.{x}.weight"]) for x in ("cls_score", "bbox_pred")
    )
    assert torch.count_nonzero(box["backbone.fpn_output2.weight"])
    assert not any(name.startswith("proposal_generator") for name in box)
    model.zero_grad(set_to_none=True)
    losses["loss_kd_rpn"].backward()
    rpn = gradients(model.student)
    assert torch.count_nonzero(rpn["proposal_generator.rpn_head.anchor_deltas.weight"])
    assert torch.count_nonzero(rpn["proposal_generator.rpn_head.objectness_logits.weight"])
    assert not any(name.startswith("roi_heads") for name in rpn)


def test_both_losses_fall_on_one_batch() -> None:
    model = pair(rcnn(), rcnn(seed=5))
    optimizer = torch.optim.SGD(model.student.parameters(), lr=1e-2, momentum=0.9)
    values = []
    for _ in range(15):
        losses = step(model, 0, inputs())
        kd = [losses["loss_kd_box"], losses["loss_kd_rpn"]]
        optimizer.zero_grad()
        sum(kd).backward()
        optimizer.step()
        values.append([float(x.detach()) for x in kd])
    assert all(last < 0.8 * first for first, last in zip(values[0], values[-1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_boxes_or_proposals(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair(rcnn(kind), rcnn(kind, seed=5))
    losses = step(model, 0, inputs(boxes=0))
    assert all(torch.isfinite(x) for x in losses.values())

    sample = model.student.roi_heads.label_and_sample_proposals
    monkeypatch.setattr(
        model.student.roi_heads,
        "label_and_sample_proposals",
        lambda proposals, targets: [x[:0] for x in sample(proposals, targets)],
    )
    if kind == "mask":
        model.student.roi_heads.mask_on = False  # Detectron2's mask loss needs a box
    losses = step(model, 0, inputs(boxes=0))
    assert float(losses["loss_kd_box"].detach()) == 0
    assert losses["loss_kd_box"].requires_grad
    sum(losses.values()).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_what_only_the_box_head_needs_is_recorded_only_for_it() -> None:
    model = pair(rcnn(), rcnn(seed=5), box=BoxHead(), fpn=CWD(tap="features"))
    assert set(model.wiring.student_taps(["fpn"])) == {"features"}
    wanted = {"roi_scores", "roi_deltas", "proposals"}
    assert set(model.wiring.student_taps(["box"])) == wanted
    step(model, 0, inputs())
    assert not any(m._forward_pre_hooks for m in model.student.modules())


def test_values_reach_the_storage_and_a_broken_one_is_explained() -> None:
    model = pair(rcnn("cascade"), rcnn("cascade", seed=5), box=BoxHead(delta_weight=0.5), rpn=RPN())
    model.log_period = 1
    with EventStorage(0) as storage:
        losses = model(inputs())
        model.flush()
        latest = {k: v[0] for k, v in storage.latest().items()}
    stages = [f"stage{k}" for k in range(3)]
    names = [f"kd/box/{part}.{stage}" for part in ("scores", "deltas") for stage in stages]
    names += [f"kd/rpn/{p}.p{i}" for p in ("logits", "deltas") for i in range(2, 7)]
    assert set(names) <= set(latest)
    assert latest["kd/box/deltas.stage1/weighted"] == 0.5 * latest["kd/box/deltas.stage1"]
    total = sum(latest[f"{name}/weighted"] for name in names if "/box/" in name)
    assert float(losses["loss_kd_box"].detach()) == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        held = model.sources["teacher"].hidden.held
        held.roi_heads.box_predictor[2].cls_score.bias.fill_(float("nan"))
    step(model, 1, inputs())
    assert "roi_scores.stage2 of source 'teacher'" in model.explain_non_finite()


# Files and plans ------------------------------------------------------------------------------


def config(tmp_path: Path, kind: str = "faster", terms: Any = None, **kwargs: Any) -> CfgNode:
    cfg = distiller_cfg(save_rcnn(tmp_path, kind, fpn=16), TERMS if terms is None else terms)
    plain = rcnn_cfg(kind, **kwargs)
    cfg.MODEL = plain.MODEL
    cfg.KD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "Distiller"
    return cfg


def test_the_config_of_the_zoos_pair_has_a_plan() -> None:
    file = CONFIGS / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x_two_stage_X_101.yaml"
    cfg = kd_cfg()
    cfg.merge_from_file(str(file))
    plain = kd_cfg()
    plain.merge_from_file(str(file).replace("_two_stage_X_101", ""))
    assert student_config(cfg) == student_config(plain)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert model.wiring.unavailable is None
    rows = {
        name: [(r.tap, r.level, r.student_channels, r.target_channels, r.rows) for r in rows]
        for name, rows in model.wiring.rows.items()
    }
    assert rows["box"] == [
        ("roi_scores", "stage0", 81, 81, 512),
        ("roi_deltas", "stage0", 320, 320, 512),
    ]
    assert [level for _, level, *_ in rows["fpn"]] == ["p2", "p3", "p4", "p5"]
    assert [level for _, level, *_ in rows["rpn"]] == 2 * ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_yaml_door(tmp_path: Path, kind: str) -> None:
    cfg = config(tmp_path, kind)
    cfg.merge_from_list(["KD.TERMS.BOX.WEIGHT", "2", "KD.TERMS.BOX.DELTA_WEIGHT", "0.25"])
    model = build_model(cfg)
    lively(model.student, 0)
    losses = step(model, 0, inputs())
    assert {f"loss_kd_{x}" for x in ("box", "rpn", "fpn")} <= set(losses)
    table = plan_table(model, (2, 128, 128))
    lines = [line.split() for line in table.splitlines()]
    boxes = [line for line in lines if line[:2] == ["teacher", "box"]]
    stages = 3 if kind == "cascade" else 1
    assert [line[2] for line in boxes] == [
        f"{tap}.stage{k}" for tap in ("roi_scores", "roi_deltas") for k in range(stages)
    ]
    assert boxes[0][4:6] == ["16", "rows"]
    # The deltas' own factor is in their weight.
    weights = {line[2].split(".")[0]: float(line[-3]) for line in boxes}
    assert weights == {"roi_scores": 2.0, "roi_deltas": 0.5}
    assert sum(line[:2] == ["teacher", "rpn"] for line in lines) == (2 if kind == "c4" else 10)
    # In eval mode it is the student, whose checkpoint it is.
    plain = build_model(student_config(cfg)).eval()
    plain.load_state_dict(model.state_dict())
    found = model.eval()(batch(((128, 128),)))[0]["instances"].get_fields()
    expected = plain(batch(((128, 128),)))[0]["instances"].get_fields()
    exactly(found["scores"], expected["scores"])
    exactly(found["pred_boxes"].tensor, expected["pred_boxes"].tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"BOX": {"TYPE": "CWD", "TAP": "roi_scores"}},
            r"Term 'box': tap 'roi_scores' gives a row",
        ),
        ({"BOX": {"TYPE": "BoxHead", "TAU": 0}}, r"KD.TERMS.BOX: BoxHead needs a finite temp"),
    ],
)
def test_what_does_not_fit_names_the_term(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(config(tmp_path, terms=change))


def test_other_classes_name_both_numbers(tmp_path: Path) -> None:
    message = r"Term 'box': stage0, beside the background: the student has 5 channels .* target 3"
    with pytest.raises(ValueError, match=message):
        build_model(config(tmp_path, classes=5))


def test_other_classes_are_matched_by_the_names_that_are_given(tmp_path: Path) -> None:
    cfg = config(tmp_path, classes=3)
    cfg.KD.SOURCES.TEACHER.CLASSES = ["c", "a", "x"]
    model = build_model(cfg)
    teacher = model.sources["teacher"]
    found = Distiller(
        student=model.student,
        sources={"teacher": teacher},
        terms={"box": BoxHead()},
        classes=("a", "b", "c"),
    )
    assert found.wiring.terms["box"].classes == ([0, 2], [1, 0])
    assert "a 0-1, c 2-0" in found.wiring.rows["box"][0].note


def test_a_student_of_one_stage_has_no_box_head(tmp_path: Path) -> None:
    cfg = distiller_cfg(save_rcnn(tmp_path), {"BOX": TERMS["BOX"]})
    assert cfg.KD.STUDENT.META_ARCHITECTURE == toy_cfg().MODEL.META_ARCHITECTURE == "RetinaNet"
    with pytest.raises(KeyError, match=r"Term 'box': RetinaNet has no tap or module 'roi_scores'"):
        build_model(cfg)
