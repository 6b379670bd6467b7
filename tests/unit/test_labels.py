"""Images without labels, and students without a task: what counts for which loss."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import retinanet
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from kd_det import Distiller, terms
from kd_det.data import is_unlabelled, register_unlabelled
from kd_det.detectors import describe
from kd_det.engine import check_data, dry_run
from kd_det.labels import is_labelled, labelled_first, run_student
from tests import toys, two_stage
from tests.configs import kd_cfg
from tests.steps import exactly, gradients, seeded, step

SIZES = ((64, 64), (50, 96), (130, 60))
TERMS = {
    "FPN": {"TYPE": "CWD", "TAP": "features"},
    "LOGITS": {"TYPE": "PI", "MODE": "sigmoid"},
}


def unlabelled(image):
    return {k: x for k, x in image.items() if k not in ("instances", "sem_seg")}


def mixed():
    """The second of three images, the widest, has no labels."""
    first, second, third = toys.batch(SIZES)
    return [first, unlabelled(second), third]


def distiller(teacher, norm="FrozenBN", **kd):
    cfg = toys.distiller_cfg(teacher, TERMS, norm=norm)
    cfg.merge_from_other_cfg(CfgNode({"KD": kd}))
    return seeded(cfg).train()


def plain(norm="FrozenBN"):
    return seeded(toys.toy_cfg(norm=norm)).train()


def kd(losses):
    return {k: v.detach() for k, v in losses.items() if k.startswith("loss_kd_")}


def task(losses):
    return {k: v.detach() for k, v in losses.items() if not k.startswith("loss_kd_")}


@pytest.fixture(autouse=True)
def _no_script(monkeypatch):
    """TorchScript recompiles a loss after its first calls in a process, to other rounding."""
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)


def test_what_is_labelled():
    image = {"image": 0, "height": 1, "width": 1, "file_name": "", "image_id": 0}
    assert not is_labelled(image)
    assert is_labelled({**image, "instances": []})  # nobody is on it: that is a label
    assert is_labelled({**image, "a project's own": 1})
    assert not is_labelled({**image, "instances": [], "unlabelled": True})
    batch = [image, {**image, "instances": 1}, {**image, "height": 2}, {**image, "instances": 2}]
    assert [x.get("instances", x["height"]) for x in labelled_first(batch)] == [1, 2, 1, 2]
    assert [x["height"] for x in labelled_first(batch)] == [1, 1, 1, 2]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_the_task_of_a_mixed_batch_is_that_of_its_labelled_part(teacher, norm):
    model, student = distiller(teacher, norm), plain(norm)
    losses = step(model, 0, mixed())
    inputs = mixed()
    with EventStorage(0):
        expected = student([inputs[0], inputs[2]])
    exactly(task(losses), task(expected))
    sum(losses[k] for k in expected).backward()
    sum(expected.values()).backward()
    exactly(gradients(model.student), gradients(student))
    # Nor does RetinaNet's moving average see the image of which nobody knows what is on it.
    assert model.student.loss_normalizer == student.loss_normalizer
    if norm == "BN":  # whose statistics saw the two parts one after the other
        counted = model.student.backbone.bottom_up.stem.conv1.norm.num_batches_tracked
        assert (counted, student.backbone.bottom_up.stem.conv1.norm.num_batches_tracked) == (2, 1)


def test_all_images_of_a_mixed_batch_are_imitated_on(teacher):
    """On one canvas, and with frozen statistics, nothing depends on what is labelled."""
    first, second, third = toys.batch(((64, 64), (50, 60), (64, 40)))
    losses = step(distiller(teacher), 0, [first, unlabelled(second), third])
    expected = step(distiller(teacher), 0, [first, third, second])
    torch.testing.assert_close(kd(losses), kd(expected))
    part = step(distiller(teacher), 0, [first, third])
    assert abs(part["loss_kd_fpn"] - expected["loss_kd_fpn"]) > 1e-3


def test_two_canvases_become_one():
    inputs = labelled_first(mixed())
    student = plain()
    taps = {name: describe(student).tap(name) for name in ("features", "cls_logits")}
    with EventStorage(0):
        _, maps = run_student(student, inputs, taps, {})
        _, behind = run_student(student, [unlabelled(x) for x in inputs[2:]], taps, {})
    assert maps["features"]["p3"].shape == (3, 8, 20, 12)  # 160 x 64 and 64 x 96
    exactly(maps["features"]["p3"][2, :, :8], behind["features"]["p3"][0])
    assert not maps["features"]["p3"][2, :, 8:].any()
    assert not maps["cls_logits"]["p3"][:2, :, :, 8:].any()


def test_a_labelled_batch_is_one_forward_and_the_plain_students(teacher):
    model, student = distiller(teacher, "BN"), plain("BN")
    calls = []
    model.student.register_forward_hook(lambda *_: calls.append(1))
    losses = step(model, 0, toys.batch(SIZES))
    with EventStorage(0):
        exactly(task(losses), task(student(toys.batch(SIZES))))
    assert len(calls) == 1


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_without_labels_the_task_is_an_exact_zero(teacher, weight):
    model = distiller(teacher, TASK_LOSS_WEIGHT=weight)
    model.student.loss_normalizer = 7.0
    losses = step(model, 0, [unlabelled(x) for x in toys.batch(SIZES)])
    assert set(task(losses)) == {"loss_cls", "loss_box_reg"}
    assert not any(task(losses).values())
    assert model.student.loss_normalizer == 7.0
    sum(v for k, v in losses.items() if not k.startswith("loss_kd_")).backward()
    parameters = [p for p in model.student.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
    assert all(kd(losses).values())
    fresh = distiller(teacher)
    step(fresh, 0, [unlabelled(x) for x in toys.batch(SIZES)])
    assert not hasattr(fresh.student, "loss_normalizer")
    with torch.no_grad(), EventStorage(0):
        assert not any(model([unlabelled(x) for x in toys.batch(SIZES)]).values())


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_weight_of_the_task(teacher, weight):
    full = step(distiller(teacher), 0)
    model = distiller(teacher, TASK_LOSS_WEIGHT=weight)
    losses = step(model, 0)
    exactly(kd(losses), kd(full))
    exactly(task(losses), {k: weight * v for k, v in task(full).items()})
    sum(losses[k] for k in task(losses)).backward()
    assert bool(model.student.head.cls_score.weight.grad.any()) == bool(weight)
    with pytest.raises(ValueError, match="finite task_loss_weight >= 0, but got -1"):
        Distiller(student=plain(), sources={}, terms={}, task_loss_weight=-1)


def test_a_task_of_no_weight_cannot_fail(teacher, monkeypatch):
    model = distiller(teacher, TASK_LOSS_WEIGHT=0.0)
    whole = model.student.losses
    monkeypatch.setattr(
        model.student, "losses", lambda *a: {k: v * float("nan") for k, v in whole(*a).items()}
    )
    losses = step(model, 0)
    assert not any(task(losses).values())
    sum(losses.values()).backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("kind", ["faster", "mask", "cascade"])
def test_two_stage_students(kind):
    model = two_stage.pair(
        two_stage.rcnn(kind),
        two_stage.rcnn(kind, seed=5),
        box=terms.BoxHead(),
        rpn=terms.RPN(),
        fpn=terms.CWD(tap="features"),
    )
    first, second = two_stage.inputs()
    losses = step(model, 0, [unlabelled(first), second])
    assert all(kd(losses).values())
    student = two_stage.rcnn(kind).train()
    torch.manual_seed(0)
    assert task(losses).keys() == task(step(student, 0, [second])).keys()
    taps = {"proposals": model.wiring.taps["proposals"]}
    with EventStorage(0):
        _, maps = run_student(student, labelled_first([unlabelled(first), second]), taps, {})
    assert all(set(rois[:, 0].tolist()) == {0, 1} for rois in maps["proposals"].values())


def test_students_of_class_maps(teacher):
    model = Distiller(
        student=build_model(toys.toy_cfg(arch="SemanticSegmentor", norm="BN")),
        sources={
            "teacher": two_stage.exact(build_model(toys.toy_cfg(arch="SemanticSegmentor", fpn=16)))
        },
        terms={"fpn": terms.CWD(tap="features")},
    ).train()
    first, second = toys.with_pixels(toys.batch())
    for inputs in ([first, unlabelled(second)], [unlabelled(first)]):
        losses = step(model, 0, inputs)
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


# -- data -----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Eleven labelled images of noise, and the same folder without labels."""
    files = toys.save_noise(tmp_path)
    cfg = toys.distiller_cfg(toys.save_teacher(tmp_path / "teacher"), TERMS)
    nodes = {"labels_few": files, "labels_more": {"IMAGES": files["IMAGES"]}}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": nodes}}))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("labels_few", "labels_more"), ("labels_few",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 4
    yield cfg
    for name in ("labels_few", "labels_more"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("order", [("labels_few", "labels_more"), ("labels_more", "labels_few")])
def test_the_sampler_mixes(data, order):
    data.DATASETS.TRAIN = order
    check_data(data, training=True)
    model = build_model(data).train()
    batches = iter(build_detection_train_loader(data))
    found = [next(batches) for _ in range(6)]
    assert {is_labelled(x) for inputs in found for x in inputs} == {True, False}
    one = next(x for inputs in found for x in inputs if not is_labelled(x))
    assert one["image_id"].endswith(".png")
    losses = step(model, 0, next(i for i in found if len({is_labelled(x) for x in i}) == 2))
    assert all(v > 0 for v in losses.values())


def test_preflight(data):
    def refused(words, *overrides):
        cfg = data.clone()
        cfg.merge_from_list(list(overrides))
        with pytest.raises(ValueError, match=words):
            check_data(cfg, training=True)

    refused("FILTER_EMPTY_ANNOTATIONS to False", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", True)
    refused("TASK_LOSS_WEIGHT to 0", "DATASETS.TRAIN", ("labels_more",))
    refused("nothing can be evaluated", "DATASETS.TEST", ("labels_more",))
    refused("without distillation", "KD.ENABLED", False)
    for sampler in ("RepeatFactorTrainingSampler", "WeightedCategoryTrainingSampler"):
        refused(f"{sampler}' counts", "DATALOADER.SAMPLER_TRAIN", sampler)
    refused("keypoints", "MODEL.KEYPOINT_ON", True)
    cfg = data.clone()
    cfg.merge_from_list(["DATASETS.TRAIN", ("labels_more",), "KD.TASK_LOSS_WEIGHT", 0])
    check_data(cfg, training=True)
    assert build_model(cfg).task_loss_weight == 0


def test_the_dry_run_of_a_batch_without_labels(data):
    data.merge_from_list(["DATASETS.TRAIN", ("labels_more",), "KD.TASK_LOSS_WEIGHT", 0])
    said = dry_run(data)
    assert "loss_cls 0, loss_box_reg 0, loss_kd_fpn" in said
    assert "of the plain student's step" in said


def test_a_later_layer_may_bring_the_labels(data, tmp_path):
    assert is_unlabelled("labels_more")
    data.merge_from_list(["KD.DATASETS.labels_more.JSON", str(tmp_path / "noise.json")])
    assert not is_unlabelled("labels_more")
    assert MetadataCatalog.get("labels_more").json_file.endswith("noise.json")


def test_registration(tmp_path):
    folder = tmp_path / "images"
    register_unlabelled("labels_folder", str(folder))
    with pytest.raises(ValueError, match=r"folder of dataset 'labels_folder' is missing"):
        DatasetCatalog.get("labels_folder")
    (folder / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no image \(\.jpg"):
        DatasetCatalog.get("labels_folder")
    for name in ("b.JPG", "a/c.png", "notes.txt"):
        (folder / name).touch()
    assert [x["image_id"] for x in DatasetCatalog.get("labels_folder")] == ["a/c.png", "b.JPG"]
    cfg = kd_cfg()
    node = {"labels_folder": {"IMAGES": str(tmp_path)}}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": node}}))
    assert MetadataCatalog.get("labels_folder").image_root == str(tmp_path)
    DatasetCatalog.register("labels_taken", list)
    with pytest.raises(ValueError, match="already taken by a dataset with labels"):
        register_unlabelled("labels_taken", str(folder))
    for name in ("labels_folder", "labels_taken"):
        DatasetCatalog.remove(name)
