"""Two photometric views: one geometry, one set of labels, Detectron2's arithmetic and streams."""

import pickle
import random
import sys

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import build_detection_train_loader as stock
from detectron2.data import transforms as T
from PIL import Image

from kd_det.context import second_view, with_images_on
from kd_det.data import PhotometricViews
from kd_det.engine import Trainer, dry_run
from kd_det.engine.loader import ResumableLoader, resumable
from kd_det.labels import is_labelled
from tests import toys
from tests.configs import kd_cfg
from tests.steps import exactly, rng_unchanged

VIEWS = ("image", "view_2")


def noise(dtype: torch.dtype = torch.uint8) -> dict:
    drawn = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(1))
    return {"image": (60 + 80 * drawn).to(dtype), "height": 20, "width": 30, "image_id": 4}


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_views_are_what_detectron2s_transforms_make(order, dtype):
    element = noise(dtype)
    seed(3)
    found = PhotometricViews(brightness=0.5, contrast=0.4, saturation=0.3, input_format=order)(
        element
    )
    seed(3)
    kinds = (T.RandomBrightness, 0.5), (T.RandomContrast, 0.4), (T.RandomSaturation, 0.3)
    flip = [0] if order == "BGR" else []
    for name in VIEWS:
        pixels = element["image"].flip(flip).permute(1, 2, 0).float().numpy()
        for kind, x in kinds:
            pixels = kind(1 - x, 1 + x).get_transform(pixels).apply_image(pixels)
        expected = torch.from_numpy(pixels).permute(2, 0, 1).flip(flip)
        assert found[name].dtype == dtype
        assert found[name].is_contiguous()
        error = (found[name] - expected.clamp(0, 255)).abs().max()
        assert error < (0.501 if dtype == torch.uint8 else 1e-3)
    assert (found["image"].float() - found["view_2"].float()).abs().mean() > 2
    assert element["image"].equal(noise(dtype)["image"])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_fill_their_range_around_one(name):
    """Of a red image: its red value b, and what contrast and saturation leave of red - green."""
    seed(0)
    strengths = {**dict.fromkeys(("brightness", "contrast", "saturation"), 0.0), name: 0.4}
    views = PhotometricViews(**strengths, input_format="RGB")
    red = {"image": torch.tensor([120.0, 20.0, 20.0]).view(3, 1, 1)}
    drawn = [views(red) for _ in range(300)]
    factors = torch.tensor([[(x[v][0] - x[v][1]) / 100 for v in VIEWS] for x in drawn])
    assert 0.6 <= factors.min() < 0.62
    assert 1.38 < factors.max() <= 1.4
    deviation = 0.8 / 12**0.5
    assert ((factors.mean(0) - 1).abs() < 3 * deviation / 300**0.5).all()
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.15  # one draw tells nothing of the other
    if name != "brightness":  # the mean and the luminance stay
        kept = torch.tensor([1.0, 1, 1] if name == "contrast" else [0.299, 0.587, 0.114])
        for x in drawn[:10]:
            torch.testing.assert_close(kept @ x["image"].flatten(), kept @ red["image"].flatten())


def test_values_are_rounded_and_clipped_not_wrapped():
    seed(0)
    views = PhotometricViews(brightness=1.0, contrast=0.0, saturation=0.0)
    bright = {"image": torch.full((3, 2, 2), 200, dtype=torch.uint8)}
    found = torch.stack([x[v] for x in map(views, [bright] * 50) for v in VIEWS])
    seed(0)
    expected = torch.tensor([200 * np.random.uniform(0, 2) for _ in range(100)])  # noqa: NPY002
    assert (expected > 256).any()
    exactly(found[:, 0, 0, 0], expected.round().clamp(0, 255).to(torch.uint8))


def test_strength_zero_is_the_mappers_image_and_draws_nothing():
    element = noise()
    with rng_unchanged():
        found = PhotometricViews(brightness=0.0, contrast=0.0, saturation=0.0)(element)
    assert all(found[v].equal(element["image"]) for v in VIEWS)


def test_what_the_mapper_leaves_out_or_made_itself_stays():
    assert PhotometricViews(lambda _: None)({}) is None
    own = {**noise(), "view_2": torch.zeros(3, 20, 30)}
    with rng_unchanged():
        assert PhotometricViews(lambda _: own)({}) is own


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strengths_are_checked(strength):
    with pytest.raises(ValueError, match=r"view's contrast is .* it lies in \[0, 1\]"):
        PhotometricViews(contrast=strength)


def test_saturation_is_of_three_known_channels():
    with pytest.raises(ValueError, match="format 'L' cannot be changed"):
        PhotometricViews(input_format="L")
    grey = {"image": torch.full((1, 4, 4), 90, dtype=torch.uint8)}
    assert PhotometricViews(saturation=0.0, input_format="L")(grey)["view_2"].shape == (1, 4, 4)


def test_a_box_holds_the_same_pixels_in_both_views(tmp_path):
    """The mapper crops, flips and resizes once, and its labels hold for both views."""
    pixels = np.full((60, 80, 3), 40, dtype=np.uint8)
    pixels[10:30, 20:50] = 160
    Image.fromarray(pixels).save(tmp_path / "box.png")
    box = {"bbox": [20, 10, 50, 30], "bbox_mode": 0, "category_id": 0}
    record = {"file_name": str(tmp_path / "box.png"), "annotations": [box]}
    transforms = [
        T.RandomCrop("relative", (0.9, 0.9)),
        T.RandomFlip(),
        T.ResizeShortestEdge((48, 90), 200, "range"),
    ]
    mapper = DatasetMapper(is_train=True, augmentations=transforms, image_format="BGR")
    seed(0)
    shapes = set()
    for _ in range(8):
        element = PhotometricViews(mapper)(record)
        shapes.add(element["image"].shape)
        x0, y0, x1, y1 = element["instances"].gt_boxes.tensor[0].round().int().tolist()
        assert element["image"].shape[1:] == element["instances"].image_size
        for view in VIEWS:
            image = element[view].float().mean(0)
            least = image[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2].min()
            image[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 0
            assert image.max() < least
    assert len(shapes) > 3


def test_second_view_takes_the_place_of_the_image():
    pair = PhotometricViews()(noise())
    (found,) = second_view([pair])
    assert found["image"] is pair["view_2"]
    assert found["image_id"] == 4
    with pytest.raises(ValueError, match=r"no 'view_2': set KD.VIEWS.ENABLED to True"):
        second_view([pair, noise()])


def test_views_are_no_labels_and_move_to_the_device():
    pair = PhotometricViews()(noise())
    assert not is_labelled(pair)
    assert is_labelled({**pair, "instances": []})
    (moved,) = with_images_on(torch.device("meta"), [pair])
    assert {moved[v].device.type for v in VIEWS} == {"meta"}
    assert pair["view_2"].device.type == "cpu"
    assert "view_2" not in with_images_on(torch.device("cpu"), [noise()])[0]


@pytest.fixture
def cfg(tmp_path):
    """Noise in both aspect ratios, half of it without labels, and a plain student."""
    cfg = kd_cfg()
    cfg.merge_from_other_cfg(toys.toy_cfg())
    files = toys.save_noise(tmp_path)
    nodes = {"views_few": files, "views_more": {"IMAGES": files["IMAGES"]}}
    cfg.merge_from_other_cfg(CfgNode({"KD": {"DATASETS": nodes}}))
    cfg.DATASETS.TRAIN = tuple(nodes)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    yield cfg
    for name in nodes:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def take(batches, count):
    return [x for _ in range(count) for x in next(batches)]


def same(found, expected, names=VIEWS):
    assert [x["file_name"] for x in found] == [x["file_name"] for x in expected]
    for name in names:
        assert all(a[name].equal(b[name]) for a, b in zip(found, expected, strict=True))


def test_the_trainers_loader_makes_them_of_every_image(cfg):
    cfg.KD.VIEWS.ENABLED = True
    trainer = Trainer(cfg)
    images = take(iter(trainer._trainer.data_loader), 6)
    assert {is_labelled(x) for x in images} == {True, False}
    assert not any(x["image"].equal(x["view_2"]) for x in images)
    # The same as of a mapper that a user wraps, for a loop of their own.
    mapper = PhotometricViews(DatasetMapper(cfg, True))
    sampler = trainer._trainer.data_loader.sampler
    seed(6)
    found = take(iter(resumable(stock(cfg, sampler=sampler), cfg)), 3)
    seed(6)
    same(found, take(iter(stock(cfg, mapper=mapper, sampler=sampler)), 3))


def test_without_them_the_loader_and_its_numbers_are_detectron2s(cfg):
    results = []
    for build in (lambda: stock(cfg), lambda: resumable(stock(cfg), cfg)):
        seed(2)
        results.append((take(iter(build()), 3), np.random.rand()))  # noqa: NPY002
    (expected, drawn), (found, again) = results
    same(found, expected, ["image"])
    assert "view_2" not in found[0]
    assert drawn == again


def test_a_resumed_loader_makes_the_same_views(cfg):
    cfg.KD.VIEWS.ENABLED, cfg.SOLVER.IMS_PER_BATCH = True, 3
    seed(5)
    loader = resumable(stock(cfg), cfg)
    batches = iter(loader)
    take(batches, 3)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    assert state["waiting"]
    drawn = np.random.get_state()  # noqa: NPY002
    expected = take(batches, 4)
    seed(9)
    resumed = resumable(stock(cfg), cfg)
    resumed.load_state_dict(state)
    np.random.set_state(drawn)  # noqa: NPY002
    same(take(iter(resumed), 4), expected)


def test_strengths_and_channel_order_come_from_the_config(cfg):
    cfg.merge_from_list(["KD.VIEWS.ENABLED", "True", "KD.VIEWS.BRIGHTNESS", "0"])
    cfg.INPUT.FORMAT = "RGB"
    views = pickle.loads(pickle.dumps(resumable(stock(cfg), cfg).dataset))._map_func
    assert (views.strengths, views.input_format) == ((0.0, 0.4, 0.4), "RGB")


def test_a_loader_of_ones_own_that_cannot_have_them_is_refused(cfg):
    assert resumable([[noise()]], cfg) is None
    cfg.KD.VIEWS.ENABLED = True
    with pytest.raises(ValueError, match=r"training loader \(list\) is not .* wrap your mapper"):
        resumable([[noise()]], cfg)
    del cfg["KD"]  # a plain config of Detectron2's
    assert isinstance(resumable(stock(cfg), cfg), ResumableLoader)


def test_the_dry_run_has_the_runs_batch(cfg, monkeypatch):
    batches = []
    module = sys.modules[dry_run.__module__]
    monkeypatch.setattr(module, "measure_step", lambda _, x: batches.append(x) or ({}, 0))
    cfg.KD.VIEWS.ENABLED, cfg.KD.ENABLED = True, False
    dry_run(cfg)
    assert all("view_2" in x for x in batches[0])
