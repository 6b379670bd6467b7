"""Distilling class logits between detectors of other classes and other anchors per cell."""

import logging

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from kd_det import Distiller, Teacher, terms
from kd_det.losses import channel_wise_kl
from kd_det.plan import plan_table
from tests.steps import step
from tests.toys import batch, distiller_cfg, randomize_norms, save_teacher, toy_cfg, toy_fcos

NINE = {"sizes": 3, "ratios": (0.5, 1.0, 2.0)}
LOGITS = {"LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"}}
DATASET = "mixed_logits_abc"


@pytest.fixture
def dataset():
    MetadataCatalog.get(DATASET).thing_classes = ["a", "b", "c"]
    yield DATASET
    MetadataCatalog.remove(DATASET)


def fcos(classes: int = 3) -> nn.Module:
    model = toy_fcos(classes=classes)
    randomize_norms(model)
    return model


def test_a_retinanet_of_nine_anchors_imitates_an_fcos_of_another_class_order(caplog):
    student, teacher = build_model(toy_cfg(**NINE)), fcos()
    with caplog.at_level(logging.INFO, "kd_det"):
        model = Distiller(
            student=student,
            sources={"teacher": Teacher(model=teacher, classes=("c", "x", "a"))},
            terms={"logits": terms.CWD(tap="cls_logits")},
            classes=("a", "b", "c"),
        )
    note = "9 and 1 anchors per cell become 1 (max); 2 classes by name, as student-target: a 0-2, "
    note += "c 2-0; of the student's left out: b; of the target's left out: x"
    assert caplog.text.count(note) == 1  # once, not once per level
    table = plan_table(model, (2, 64, 64))
    assert table.count(f"logits: {note}") == 1
    assert table.count("27 -> 3") == 5
    inputs = batch()
    seen = {}
    student.head.cls_score.register_forward_hook(
        lambda m, i, out: seen.setdefault("student", []).append(out)
    )
    losses = step(model, 0, inputs)
    held = model.sources["teacher"].hidden.held
    with torch.no_grad():
        features = held.backbone(held.preprocess_image(inputs).tensor)
        targets = [
            held.head.cls_score(held.head.cls_subnet(features[f"p{i}"])) for i in range(3, 8)
        ]
    expected = 0
    for s, t in zip(seen["student"], targets, strict=True):
        best = torch.stack([s[:, 3 * a : 3 * a + 3] for a in range(9)]).amax(0)
        expected += channel_wise_kl(best[:, [0, 2]], t[:, [2, 0]])
    torch.testing.assert_close(losses["loss_kd_logits"], expected)

    losses["loss_kd_logits"].backward()
    a, b, c = student.head.cls_score.weight.grad.view(9, 3, -1).abs().sum((0, 2))
    assert a > 0
    assert b == 0  # the task's alone
    assert c > 0


def test_and_the_other_way_round():
    torch.manual_seed(1)
    teacher = build_model(toy_cfg(**NINE))
    student = fcos()
    losses = {}
    for names in ("abc", "cab"):
        model = Distiller(
            student=student,
            sources={"teacher": Teacher(model=teacher, classes=tuple(names))},
            terms={"logits": terms.CWD(tap="cls_logits")},
            classes=tuple("abc"),
        )
        assert {row.connector for row in model.wiring.rows["logits"]} == {
            "max" if names == "abc" else "max, by name"
        }
        losses[names] = step(model, 0)["loss_kd_logits"]
        losses[names].backward()
    assert all(value > 0 for value in losses.values())
    assert losses["abc"] != losses["cab"]
    assert torch.count_nonzero(student.head.cls_score.weight.grad)


# From a config --------------------------------------------------------------------------------


def cfg_of(folder, dataset: str, names: list[str], count: int = 3) -> CfgNode:
    cfg = distiller_cfg(save_teacher(folder, classes=count), LOGITS)
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.merge_from_other_cfg(CfgNode({"KD": {"SOURCES": {"TEACHER": {"CLASSES": names}}}}))
    return cfg


def test_a_config_names_the_teachers_classes(tmp_path, dataset):
    model = build_model(cfg_of(tmp_path, dataset, ["x", "c", "y", "b"], count=4))
    (note,) = {row.note for row in model.wiring.rows["logits"]}
    assert note.startswith("2 classes by name, as student-target: b 1-3, c 2-1; of the student's")
    assert {row.compared_channels for row in model.wiring.rows["logits"]} == {2}
    assert step(model, 0)["loss_kd_logits"] > 0


def test_both_datasets_are_known(tmp_path, dataset, caplog):
    cfg = cfg_of(tmp_path, dataset, [])
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(teacher.read_text().replace("TRAIN: []", f"TRAIN: [{dataset}]"))
    with caplog.at_level(logging.INFO, "kd_det"):
        model = build_model(cfg)
    assert not any("Term 'logits'" in r.message for r in caplog.records)  # nothing to be said
    assert {row.connector for row in model.wiring.rows["logits"]} == {"-"}
    assert all(isinstance(m, nn.Identity) for m in model.terms["logits"].target_channels.values())


def test_an_unknown_dataset_of_as_many_classes_is_taken_to_have_the_same(tmp_path, dataset, caplog):
    cfg = cfg_of(tmp_path, dataset, [])
    with caplog.at_level(logging.INFO, "kd_det"):
        model = build_model(cfg)
    said = [r.message for r in caplog.records if "Term 'logits'" in r.message]
    assert said == ["Term 'logits': not known by name: the 3 classes of both in the same order."]
    assert step(model, 0)["loss_kd_logits"] > 0


def test_an_unknown_dataset_of_other_classes_is_an_error(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"Term 'logits': level p3 .* those of the target are"):
        build_model(cfg_of(tmp_path, dataset, [], count=4))
    with pytest.raises(ValueError, match=r"no class in common: the student's are a, b, c, the tar"):
        build_model(cfg_of(tmp_path, dataset, ["x", "y", "z"]))
    with pytest.raises(ValueError, match=r"Source 'teacher': 2 CLASSES are named \(a, b\)"):
        build_model(cfg_of(tmp_path, dataset, ["a", "b"]))


def test_another_run_with_other_classes_does_not_resume(tmp_path, dataset):
    one = build_model(cfg_of(tmp_path, dataset, ["b", "a", "c"]))
    other = build_model(cfg_of(tmp_path, dataset, ["c", "b", "a"]))
    with pytest.raises(ValueError, match="other"):
        other.load_kd_state_dict(one.kd_state_dict())
