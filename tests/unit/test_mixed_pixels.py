"""
Pixels of a mixed pair: a teacher with RGB images and ImageNet's statistics beside a BGR student.
Exact tensors, at the door of both backbones.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import nn

from kd_det import Distiller, Teacher, terms
from tests import toys

# As torchvision writes them, for images from 0 to 1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((64, 64), (50, 60))


def rgb_cfg():
    cfg = toys.toy_cfg(fpn=16)
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [255 * x for x in MEAN]
    cfg.MODEL.PIXEL_STD = [255 * x for x in STD]
    return cfg


def rgb_detector() -> nn.Module:
    """What the LazyConfig below builds."""
    model = RetinaNet(rgb_cfg())  # on whatever device is current, as LazyConfigs build
    del model.input_format  # which they seldom set: the data loader says what it is
    return model


def lazy_file(folder):
    path = folder / "teacher.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from tests.unit.test_mixed_pixels import rgb_detector\n"
        "dataloader = dict(train=dict(mapper=dict(image_format='RGB')))\n"
        "model = L(rgb_detector)()\n"
    )
    return str(path)


def yaml_file(folder):
    path = folder / "teacher.yaml"
    cfg = rgb_cfg()
    del cfg["KD"]
    path.write_text(cfg.dump())
    return str(path)


@pytest.mark.parametrize("door", [yaml_file, lazy_file, None])
def test_each_sees_its_own_pixels(tmp_path, door):
    detector = build_model(rgb_cfg())
    if door is None:
        source = Teacher(model=detector)
    else:
        torch.save({"model": detector.state_dict()}, tmp_path / "teacher.pth")
        source = Teacher(config_file=door(tmp_path), weights=str(tmp_path / "teacher.pth"))
    student = build_model(toys.toy_cfg())  # BGR, Detectron2's statistics
    distiller = Distiller(
        student=student, sources={"teacher": source}, terms={"fpn": terms.CWD(tap="features")}
    )
    distiller.prepare()
    seen = {}
    for name, model in (("student", student), ("teacher", source.hidden.held)):
        model.backbone.register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0].clone()})
        )
    inputs = toys.batch(SIZES)
    distiller(inputs)
    statistics = {
        "student": (torch.tensor([103.53, 116.28, 123.675]), torch.ones(3)),
        "teacher": (255 * torch.tensor(MEAN), 255 * torch.tensor(STD)),
    }
    for name, (mean, std) in statistics.items():
        for i, x in enumerate(inputs):
            blue_green_red = x["image"].float()
            own = blue_green_red if name == "student" else blue_green_red[[2, 1, 0]]
            expected = (own - mean[:, None, None]) / std[:, None, None]
            h, w = expected.shape[-2:]
            torch.testing.assert_close(seen[name][i, :, :h, :w], expected, rtol=1e-6, atol=1e-6)
            # Detectron2 pads what is normalised already: padding is the mean colour of each side.
            assert not seen[name][i, :, h:].any()
            assert not seen[name][i, :, :, w:].any()
