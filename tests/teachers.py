"""Teachers of the toys, and what stock Detectron2 computes in their place."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from torch.testing import assert_close

from kd_det.context import Context
from kd_det.sources import Teacher
from tests import toys

TAPS = ("features", "cls_logits")
INPUTS = toys.batch(((64, 64), (50, 60)))


def assert_same(ours, theirs):
    """Equal up to the rounding of folded weights over 50 layers."""
    assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


class Owner(nn.Module):
    """What a Distiller is to a teacher: a module with a student and a source."""

    def __init__(self, teacher):
        super().__init__()
        self.student = nn.Linear(1, 1)
        self.teacher = teacher


def context(inputs=INPUTS, input_format="BGR"):
    return Context(inputs, input_format, nn.Identity())


def build(files):
    """The teacher's detector as stock Detectron2 builds and loads it."""
    config, weights = files
    cfg = get_cfg()
    cfg.merge_from_file(config)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    return model


def stock_maps(files, inputs=INPUTS):
    """Features and logits as the detector itself computes them in eval mode."""
    model = build(files)
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        logits, _ = model.head([features[f] for f in model.head_in_features])
    return features, dict(zip(model.head_in_features, logits, strict=True))


def started(files, taps=TAPS, **kwargs):
    source = Teacher(config_file=files[0], weights=files[1], **kwargs)
    source.prepare(taps)
    return source


def altered(files, tmp_path, change):
    """The path of a copy of the weights file whose state dict was changed."""
    state = torch.load(files[1])["model"]
    change(state)
    path = tmp_path / "altered.pth"
    torch.save({"model": state}, path)
    return files[0], str(path)


def measured(files, folder, inputs=INPUTS):
    """The teacher with BatchNorm statistics of images, as training leaves them, in a new file."""
    model = build(files).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None  # the plain mean
    with torch.no_grad():
        model.backbone(model.preprocess_image(inputs).tensor)
    path = folder / "measured.pth"
    torch.save({"model": model.state_dict()}, path)
    return files[0], str(path)
