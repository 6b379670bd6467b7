"""Two teachers of disjoint classes into one student: each class learns from its own teacher."""

import json

import pytest
import torch
from detectron2.modeling import build_model

from benchmarks import two_teachers
from kd_det import Distiller, Teacher, terms
from kd_det.data.synthetic import CLASSES, make_synthetic_coco
from kd_det.regions import Ones
from tests import toys
from tests.steps import step

STUDENT = ("bus", "person", "car", "dog", "child")
CARS, PEOPLE = ("car", "bus", "bike"), ("cat", "child", "person")
RANGES = {"cars": [0, 2], "people": [1, 4]}  # of the student's classes; its dogs are nobody's
ANCHORS = 2


def detector(classes: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_model(toys.toy_cfg(classes=classes, sizes=ANCHORS, norm="FrozenBN"))
    for layer in (model.head.cls_score, model.head.bbox_pred):
        layer.weight.data.normal_(0, 0.1)
        layer.bias.data.normal_(0, 0.5)
    return model


TERMS = {
    "CWD": lambda source: terms.CWD(tap="cls_logits", source=source, region=Ones()),
    "PI sigmoid": lambda source: terms.PI(mode="sigmoid", source=source),
    "PI softmax": lambda source: terms.PI(source=source),
    "boxes too": lambda source: terms.LogitBoxKD(normalizer="cells", source=source),
    "scores": lambda source: terms.LogitBoxKD(normalizer="cells", source=source, box_weight=0.0),
}


@pytest.mark.parametrize("kind", TERMS)
def test_each_class_range_learns_from_its_own_teacher_only(kind):
    def model(people_seed: int) -> Distiller:
        return Distiller(
            student=detector(len(STUDENT), 1),
            sources={
                "cars": Teacher(model=detector(len(CARS), 2), classes=CARS),
                "people": Teacher(model=detector(len(PEOPLE), people_seed), classes=PEOPLE),
            },
            terms={name: TERMS[kind](name) for name in RANGES},
            classes=STUDENT,
        ).train()

    found = {}
    for seed in (3, 4):
        distiller = model(seed)
        logits: list[torch.Tensor] = []
        distiller.student.head.cls_score.register_forward_hook(
            lambda m, i, out, logits=logits: logits.append(out)
        )
        losses = step(distiller, 0)
        for name, own in RANGES.items():
            grads = torch.autograd.grad(losses[f"loss_kd_{name}"], logits, retain_graph=True)
            by_class = [g.unflatten(1, (ANCHORS, len(STUDENT))) for g in grads]  # (N, A, K, H, W)
            others = [k for k in range(len(STUDENT)) if k not in own]
            assert not any(g[:, :, others].any() for g in by_class)
            assert all(any(g[:, :, k].any() for g in by_class) for k in own)
            found[name, seed] = grads
    # Another teacher of people changes nothing for cars, to the bit.
    assert all(torch.equal(a, b) for a, b in zip(found["cars", 3], found["cars", 4], strict=True))
    assert not torch.equal(found["people", 3][0], found["people", 4][0])


def test_the_comparison_is_wired_by_name(tmp_path):
    """Data, configs and classes of benchmarks/two_teachers.py; see the slow test for its result."""
    make_synthetic_coco(tmp_path / "data_seed1", seed=1, num_train=12, num_val=4)
    two_teachers.split(tmp_path / "data_seed1")
    counts = {}
    for half in ("", "_round", "_edged"):
        file = tmp_path / f"data_seed1/annotations/instances_train{half}.json"
        content = json.loads(file.read_text())
        counts[half] = len(content["annotations"]), len(content["categories"])
    assert counts["_round"][0] + counts["_edged"][0] == counts[""][0]
    assert (counts[""][1], counts["_round"][1], counts["_edged"][1]) == (6, 3, 3)
    model = build_model(two_teachers.config_of("two_teachers", tmp_path, 1))
    assert model.task_loss_weight == 0
    for half, names in two_teachers.HALVES.items():
        note = model.wiring.rows[half][0].note
        assert all(f"{name} {CLASSES.index(name)}-" in note for name in names)
        assert model.sources[half].class_names == list(names)


@pytest.mark.slow
def test_the_student_beats_each_teacher_on_the_union(tmp_path):
    results = two_teachers.compare(tmp_path, seed=1)
    ap = {name: result["AP"] for name, result in results.items()}
    assert ap["two_teachers"] > max(ap["round"], ap["edged"]) > 0
