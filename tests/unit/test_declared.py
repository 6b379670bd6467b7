"""Teachers that are a function of images: TorchScript files and callables."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_det import Distiller, terms
from kd_det.build import build_items
from kd_det.detectors import Declared
from kd_det.registry import SOURCES
from kd_det.sources import ScriptedTeacher, SourceUnavailable, Teacher
from kd_det.sources.weights_file import file_fingerprint
from tests import configs, toys
from tests.steps import seeded, step
from tests.teachers import INPUTS, Owner, context

NAMES = ("features", "cls_logits")
MEAN, STD = (10.0, 20.0, 30.0), (50.0, 60.0, 70.0)


class Net(nn.Module):
    """Two levels and their class logits (2 anchors x 3 classes), with BatchNorm in between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 8, stride=8)
        self.norm = nn.BatchNorm2d(5)
        self.down = nn.Conv2d(5, 5, 2, stride=2)
        self.head = nn.Conv2d(5, 6, 1)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        p3 = self.norm(self.stem(images))
        maps = [p3, self.down(p3)]
        return maps, [self.head(x) for x in maps]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    net = Net()
    toys.randomize_norms(net)
    return net.eval()


@pytest.fixture(scope="module")
def script(net, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("script") / "teacher.pt")
    torch.jit.script(net).save(path)
    return path


def sources(net, script, **kwargs):
    """The three doors to one teacher."""

    def function(images):
        return dict(zip(NAMES, net(images), strict=True))

    return {
        "script": ScriptedTeacher(weights=script, outputs=NAMES, **kwargs),
        "module": Teacher(model=Declared(net, NAMES, **kwargs)),
        "function": Teacher(model=Declared(function, NAMES, **kwargs)),
    }


DOORS = pytest.mark.parametrize("door", ["script", "module", "function"])


def normalised(inputs, mean=MEAN, std=STD):
    """What the network gets: the batch of two, padded to 64 x 64."""
    canvas = torch.zeros(2, 3, 64, 64)
    for row, x in zip(canvas, inputs, strict=True):
        h, w = x["image"].shape[1:]
        row[:, :h, :w] = (x["image"] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
            3, 1, 1
        )
    return canvas


@DOORS
def test_maps_are_those_of_the_network(net, script, door):
    source = sources(net, script, pixel_mean=MEAN, pixel_std=STD)[door]
    shapes = source.shapes(NAMES)
    assert [(s.level, s.channels, s.stride, s.kind) for s in shapes["features"]] == [
        ("0", 5, 8, "feature"),
        ("1", 5, 16, "feature"),
    ]
    assert {s.kind for s in shapes["cls_logits"]} == {"logits"}
    source.prepare(NAMES)
    for inputs, swap in ((INPUTS, "BGR"), ([{"image": x["image"].flip(0)} for x in INPUTS], "RGB")):
        maps = source(context(inputs, swap), NAMES).maps
        with torch.no_grad():
            features, logits = net(normalised(INPUTS))
        for i, level in enumerate("01"):
            torch.testing.assert_close(maps["features"][level], features[i])
            torch.testing.assert_close(maps["cls_logits"][level], logits[i])
            assert not maps["features"][level].requires_grad


@DOORS
def test_raw_images_where_nothing_is_declared(net, script, door):
    source = sources(net, script)[door]
    source.prepare(NAMES)
    found = source(context(), ("features",)).maps
    assert list(found) == ["features"]
    with torch.no_grad():
        expected = net(normalised(INPUTS, (0, 0, 0), (1, 1, 1)))[0]
    torch.testing.assert_close(found["features"]["1"], expected[1])


@DOORS
def test_the_promises_of_a_teacher(net, script, door):
    source = sources(net, script)[door]
    before = copy.deepcopy(net.state_dict())
    source.shapes(NAMES)
    source.prepare(NAMES)
    owner = Owner(source).train()
    source(context(), NAMES)
    assert {id(p) for p in owner.parameters()} == {id(p) for p in owner.student.parameters()}
    assert list(owner.state_dict()) == ["student.weight", "student.bias"]
    held = source.hidden.held
    assert not any(p.requires_grad for p in held.parameters())
    assert not held.training
    assert copy.deepcopy(owner).teacher.hidden.held is held
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="maps and no boxes"):
        source.detector()
    if door != "function":
        assert list(held.parameters())
        owner.double()
        assert {p.dtype for p in held.parameters()} == {torch.float64}
        assert source(context(), NAMES).maps["features"]["0"].dtype == torch.float64
    if door == "script":
        assert source.fingerprint() == file_fingerprint(script)
    source.release()
    assert source.hidden.held is None


def test_measuring_leaves_a_training_network_as_it_is(net):
    net = copy.deepcopy(net).train()
    before = copy.deepcopy(net.state_dict())
    Teacher(model=Declared(net, NAMES)).shapes(NAMES)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_function_cannot_leak_gradients(net):
    def fn(x):
        with torch.enable_grad():
            return net.stem(x)

    source = Teacher(model=Declared(fn, ["features"]))
    source.prepare(("features",))
    assert not source(context(), ("features",)).maps["features"]["0"].requires_grad


def test_classes_by_name_and_anchors(script):
    source = ScriptedTeacher(weights=script, outputs=NAMES, classes=("a", "b", "c"))
    shape = source.shapes(NAMES)["cls_logits"][0]
    assert (shape.anchors, shape.names) == (2, ("a", "b", "c"))


def test_from_a_config_into_a_step(script):
    node = {"TYPE": "ScriptedTeacher", "WEIGHTS": script, "OUTPUTS": ["features", "cls_logits"]}
    node.update(PIXEL_MEAN=[103, 116, 123], PIXEL_STD=[1, 1, 1], CLASSES=["a", "b", "c"])
    cfg = configs.merged({"FPN": configs.FPN}, SOURCES={"TEACHER": node})
    found = build_items(cfg.KD.SOURCES, SOURCES, "KD.SOURCES")
    model = Distiller(
        student=seeded(toys.toy_cfg(sizes=2)),
        sources=found,
        terms={
            "fpn": terms.CWD(tap="features"),
            "logits": terms.CWD(tap="cls_logits"),
        },
        classes=("c", "b", "a"),
    )
    assert {r.level for r in model.wiring.rows["fpn"]} == {"p3", "p4"}
    assert "by name" in model.wiring.rows["logits"][0].note
    losses = step(model.train(), 0)
    (losses["loss_kd_fpn"] + losses["loss_kd_logits"]).backward()
    assert model.student.head.cls_score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": ()}, "declared by a list of names"),
        ({"outputs": ("a", "a")}, "each once"),
        ({"pixel_mean": MEAN}, "three channels each, or by none"),
        ({"pixel_mean": MEAN, "pixel_std": (1.0, 1.0, 0.0)}, "not 0"),
        ({"weights": ""}, "needs WEIGHTS"),
        ({"sha256": "xyz"}, "hexadecimal"),
    ],
)
def test_arguments(script, arguments, words):
    with pytest.raises(ValueError, match=words):
        ScriptedTeacher(**{"weights": script, **arguments})


@pytest.mark.parametrize(
    ("result", "outputs", "words"),
    [
        (lambda x: {"feat": x}, ["features"], "returned feat: there is no features"),
        (lambda x: (x, x, x), NAMES, r"2 outputs are declared .* returned 3 \(tuple\)"),
        (lambda x: x, NAMES, r"returned 1 \(Tensor\)"),
        (lambda x: x.flatten(1), ["features"], r"gives \(1, \d+\), not an \(N, C, H, W\) map"),
    ],
)
def test_other_outputs_than_declared(result, outputs, words):
    with pytest.raises(ValueError, match=words):
        Teacher(model=Declared(result, outputs)).shapes(tuple(outputs))


def test_files_that_are_no_script(script, tmp_path):
    with pytest.raises(SourceUnavailable, match=r"no weights file 'gone\.pt'"):
        ScriptedTeacher(weights="gone.pt").shapes(("features",))
    with pytest.raises(KeyError, match="Presets: features, cls_logits"):
        ScriptedTeacher(weights=script, outputs=NAMES).shapes(("res4",))
    plain = str(tmp_path / "model.pth")
    torch.save({"model": {"w": torch.zeros(2)}}, plain)
    damaged = bytearray(Path(script).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    for file in (plain, str(tmp_path / "damaged.pt")):
        with pytest.raises(ValueError, match=r"cannot be read as a file of torch\.jit\.save"):
            ScriptedTeacher(weights=file).shapes(("features",))
    with pytest.raises(ValueError, match="SHA-256"):
        ScriptedTeacher(weights=script, sha256="0" * 64).shapes(("features",))
