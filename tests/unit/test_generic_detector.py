"""Any module by module paths: measured and run through its own forward, stopped behind the taps."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.testing import assert_close

from kd_det import Distiller, Teacher, terms
from kd_det.context import Context
from kd_det.detectors import AnyModule, Detector, describe, probe, running_values
from kd_det.detectors.detector import Depth
from kd_det.registry import DETECTORS
from kd_det.sources.model_config import ModelConfig
from kd_det.taps import Recorder
from kd_det.tools.taps import tap_table
from tests import toys

LEVELS = ["p3", "p4", "p5", "p6", "p7"]
INPUTS = toys.batch(((64, 64), (48, 64)))


class Own(nn.Module):
    """
    A user's meta-architecture: preprocessing inside of the forward, a loop over levels in it, a
    BatchNorm that counts its calls, boxes selected by score.
    """

    def __init__(self, fpn: int = 8) -> None:
        super().__init__()
        self.backbone = build_backbone(toys.toy_cfg(fpn=fpn))
        self.head = nn.ModuleDict({"tower": nn.Conv2d(fpn, fpn, 3, padding=1)})
        self.classify = nn.Conv2d(fpn, 3, 1)
        self.norm = CycleBatchNormList(5, num_features=fpn)
        self.decode = nn.Identity()
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 110.0), False)
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 57.0), False)

    def images(self, batched_inputs: list[dict]) -> Tensor:
        images = [(x["image"] - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility).tensor

    def logits(self, batched_inputs: list[dict]) -> list[Tensor]:
        features = self.backbone(self.images(batched_inputs))
        found = []
        for level in LEVELS:
            found.append(self.classify(self.head["tower"](features[level])))
            self.norm(features[level])
        return found

    def forward(self, batched_inputs: list[dict]) -> object:
        logits = self.logits(batched_inputs)
        if self.training:
            return {"loss_own": sum(x.sigmoid().mean() for x in logits)}
        best = self.decode(logits[0]).flatten(1).max(1)
        return [{"score": x.item()} for x in best.values.detach()]


class WithoutBackbone(nn.Module):
    """Its forward needs values early on."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1), False)

    def forward(self, batched_inputs: list[dict]) -> Tensor:
        x = self.early(torch.stack([x["image"].float() for x in batched_inputs]))
        return self.late(x / x.abs().max().item())


@pytest.fixture
def own() -> Own:
    model = Own()
    toys.randomize_norms(model)
    return model


def net() -> nn.Sequential:
    """A plain network, channels 3 -> 4 -> 16, strides 2 and 8."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 16, 3, stride=4, padding=1)),
        nn.Flatten(),
    )


def cast(x: Tensor) -> Tensor:
    return x


def calls_of(module: nn.Module) -> list[int]:
    count: list[int] = []
    module.register_forward_hook(lambda *_: count.append(1))
    return count


# -- taps -----------------------------------------------------------------------------------------


def test_presets_are_those_of_a_backbone(own: Own) -> None:
    assert type(describe(own)) is AnyModule
    assert list(describe(own).presets()) == ["features", "res3", "res4", "res5"]
    assert describe(own).tap("features").levels == tuple(LEVELS)
    assert describe(net()).presets() == {}


def test_module_paths_are_measured_as_a_real_forward_gives_them(own: Own) -> None:
    names = ["features", "res4", "head.tower", "classify", "norm", "backbone.fpn_output4"]
    taps = [describe(own).tap(name) for name in names]
    shapes = probe(own, taps)
    own.eval()
    with Recorder(own, taps) as recorder, torch.no_grad():
        own(toys.batch(((128, 128),)))
    for tap in taps:
        maps = recorder.maps(tap)
        assert [s.level for s in shapes[tap.name]] == list(maps)
        assert [s.channels for s in shapes[tap.name]] == [x.shape[1] for x in maps.values()]
        assert [s.stride for s in shapes[tap.name]] == [128 // x.shape[3] for x in maps.values()]
        assert {s.calls for s in shapes[tap.name]} == {len(recorder.calls[tap.path])}
    assert [s.calls for s in shapes["classify"]] == [5] * 5


def test_a_plain_network_is_measured_too() -> None:
    (shape,) = probe(net(), [describe(net()).tap("1")])["1"]
    assert (shape.channels, shape.stride, shape.calls) == (16, 8, 1)


def test_wrong_paths_name_the_nearest() -> None:
    with pytest.raises(KeyError, match=r"no tap or module 'head.towr'. Did you mean 'head.tower'"):
        describe(Own()).tap("head.towr")
    with pytest.raises(KeyError, match="Presets: none"):
        describe(net()).tap("x")


def test_a_forward_that_needs_values_says_what_to_register() -> None:
    model = WithoutBackbone()
    # What fires before the values are needed can be measured.
    assert probe(model, [describe(model).tap("early")])["early"][0].channels == 4
    with pytest.raises(ValueError, match=r"failed before reaching late .*item.*") as e:
        probe(model, [describe(model).tap("late")])
    assert "Detector under the name WithoutBackbone in kd_det.registry.DETECTORS" in str(e.value)


def test_a_registered_description_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Detector):
        def depths(self) -> list[Depth]:
            return [Depth(("early", "late"), lambda x: self.model.late(self.model.early(x)))]

    DETECTORS._do_register("WithoutBackbone", Mine)
    try:
        model = WithoutBackbone()
        assert type(describe(model)) is Mine
        model_tap = Mine(model).tap
        monkeypatch.setattr(Mine, "presets", lambda self: {})
        assert probe(model, [model_tap("late")])["late"][0].stride == 4
    finally:
        del DETECTORS._obj_map["WithoutBackbone"]


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"an nn\.Module, but got a function"):
        describe(net)  # type: ignore[arg-type]  # which is what is refused


def test_the_taps_of_a_network_without_presets_are_listed() -> None:
    table = tap_table(net())
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["0", "1", "1.0", "1.1"]


# -- running --------------------------------------------------------------------------------------


def measured(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Calls by path; before hooks count, because a meta copy has them too."""
    taps = [describe(model).tap(name) for name in names]
    shapes = probe(model, taps)
    return {tap.path: shapes[tap.name][0].calls for tap in taps}


def run(model: nn.Module, names: list[str], calls: dict[str, int], stop: bool = True) -> Recorder:
    detector = describe(model)
    taps = [detector.tap(name) for name in names]
    with Recorder(model, taps, calls) as recorder, torch.no_grad():
        detector.run_batch(INPUTS, taps, cast, calls if stop else None)
    return recorder


def test_taps_in_the_backbone_need_no_forward_of_the_model(own: Own) -> None:
    own.eval()
    calls = measured(own, ["res3", "features", "res4"])
    pyramid, head = calls_of(own.backbone), calls_of(own.classify)
    run(own, ["res3"], calls)
    assert not pyramid
    maps = run(own, ["features", "res4"], calls).maps(describe(own).tap("features"))
    assert len(pyramid) == 1
    assert not head
    with torch.no_grad():
        expected = own.backbone(own.images(INPUTS))
    for level, x in maps.items():
        assert_close(x, expected[level], rtol=0, atol=0)


@pytest.mark.parametrize("stop", [False, True])
def test_a_forward_is_stopped_behind_its_taps(own: Own, stop: bool) -> None:
    own.eval()
    calls = measured(own, ["classify", "features"])
    decoded, norms = calls_of(own.decode), calls_of(own.norm)
    recorder = run(own, ["classify", "features"], calls, stop)
    assert len(decoded) == (0 if stop else 1)
    assert len(norms) == (4 if stop else 5)
    assert own.norm._pos == 0  # in phase, though it was called four times
    with torch.no_grad():
        expected = own.logits(INPUTS)
    maps = recorder.maps(describe(own).tap("classify"))
    for found, logits in zip(maps.values(), expected, strict=True):
        assert_close(found, logits, rtol=0, atol=0)
    assert not any(m._forward_hooks for m in [own, own.head, own.head["tower"]])


def test_what_a_module_list_holds_are_parts(own: Own) -> None:
    own.eval()
    calls = measured(own, ["head.tower"])
    behind = calls_of(own.classify)
    run(own, ["head.tower"], calls)
    assert len(behind) == 4  # the fifth level is not classified


def test_a_stop_waits_for_the_end_of_the_part(own: Own) -> None:
    """Nothing inside of a part is cut off."""
    own.eval()
    own.part = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    inner = calls_of(own.part[1])
    logits = own.logits
    own.logits = lambda inputs: [own.part(x) for x in [torch.rand(1, 8, 4, 4)]] and logits(inputs)
    with torch.no_grad():
        describe(own).run_batch(INPUTS, [describe(own).tap("part.0")], cast, {"part.0": 1})
    assert len(inner) == 1


def test_errors_of_the_model_are_its_own(own: Own) -> None:
    own.eval()
    calls = measured(own, ["classify"])
    own.decode.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(own, ["classify"], calls, stop=False)


# -- as teacher and as student --------------------------------------------------------------------


def distiller(student: nn.Module, teacher: Teacher, **taps: str) -> Distiller:
    return Distiller(
        student=student, sources={"teacher": teacher}, terms={"kd": terms.CWD(**taps)}, max_iter=9
    )


def steps(model: Distiller, number: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for step in range(number):
        model.set_progress(step / number)
        losses = model(INPUTS)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(float(losses["loss_kd_kd"].detach()))
    return values


@pytest.mark.parametrize("taps", [{"tap": "features"}, {"tap": "classify"}])
def test_a_meta_architecture_of_the_users_own_learns_from_its_like(taps: dict[str, str]) -> None:
    teacher = Own(fpn=16)
    toys.randomize_norms(teacher)
    model = distiller(Own(), Teacher(model=teacher), **taps)
    assert len(model.wiring.rows["kd"]) == 5
    assert all(value > 0 for value in steps(model))
    assert list(model.state_dict()) == list(Own().state_dict())
    assert set(model.eval()(INPUTS)[0]) == {"score"}


def test_mixed_with_a_known_architecture() -> None:
    model = distiller(build_model(toys.toy_cfg()), Teacher(model=Own(fpn=16)))
    assert [row.level for row in model.wiring.rows["kd"]] == LEVELS
    assert all(value > 0 for value in steps(model))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_gives_what_the_model_computes(own: Own, precision: str) -> None:
    source = Teacher(model=own, precision=precision, input_format="RGB")
    source.shapes(("classify",))
    source.prepare(("classify",))
    context = Context(INPUTS, "BGR", nn.Identity())
    maps = [source(context, ("classify",)).maps["classify"] for _ in range(3)]
    own.eval()
    with torch.no_grad():
        expected = own.logits([{**x, "image": x["image"].flip(0)} for x in INPUTS])
    tolerance = 1e-5 if precision == "float32" else 0.1
    for found in maps:  # to the end, and stopped twice
        for x, logits in zip(found.values(), expected, strict=True):
            assert str(x.dtype).endswith(precision)
            assert_close(x.float(), logits, rtol=0, atol=tolerance * float(logits.abs().max()))


def test_a_plain_network_teaches_from_the_images_themselves() -> None:
    teacher = net()
    toys.randomize_norms(teacher)
    model = distiller(
        build_model(toys.toy_cfg()), Teacher(model=teacher), tap="res3", source_tap="1"
    )
    (row,) = model.wiring.rows["kd"]
    assert (row.student_channels, row.target_channels, row.stride) == (8, 16, 8)
    assert all(value > 0 for value in steps(model))
    source = Teacher(model=teacher)
    source.shapes(("1",))
    source.prepare(("1",))
    found = source(Context(INPUTS, "BGR", nn.Identity()), ("1",)).maps["1"]["0"]
    images = torch.zeros(2, 3, 64, 64)
    for image, x in zip(images, INPUTS, strict=True):
        image[:, : x["image"].shape[1]] = x["image"]
    with torch.no_grad():
        expected = teacher.eval()[:2](images)
    assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Sliding(nn.Module):
    """Calls its network more often on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return sum(self.net(images) for _ in range(1024 // images.shape[-1]))


def test_a_module_that_fires_more_often_than_measured_is_seen() -> None:
    source = Teacher(model=Sliding())
    source.shapes(("net",))
    source.prepare(("net",))
    with pytest.raises(RuntimeError, match=r"called 16 time.*should be called 2 time"):
        source(Context(INPUTS, "BGR", nn.Identity()), ("net",))


class Reads(nn.Module):
    """Its constructor needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(int(torch.tensor([3, 4]).sum().item()), 1)


def test_a_constructor_that_reads_values_is_built_with_storage_first(tmp_path: Path) -> None:
    file = tmp_path / "reads.py"
    lines = "from detectron2.config import LazyCall as L", f"from {__name__} import Reads"
    file.write_text("\n".join([*lines, "model = L(Reads)()"]))
    model = ModelConfig(str(file), what="teacher").build("meta")
    assert model.layer.weight.is_meta
    assert model.layer.weight.shape == (1, 7)


def test_compiled_parts_are_found(own: Own) -> None:
    source = Teacher(model=own, compile=True)
    source.shapes(("classify",))
    source.prepare(("classify",))
    compiled = {name for name, m in source.hidden.held.named_modules() if "forward" in vars(m)}
    assert {"backbone", "head.tower", "classify"} <= compiled


def test_numbers_of_runs_are_still_found() -> None:
    """Checkpoints of a Distiller carry the loss normalizer of the detector inside."""
    model = build_model(toys.toy_cfg())
    model.loss_normalizer = 7.0
    assert running_values(nn.ModuleDict({"student": model})) == {"loss_normalizer": 7.0}
    assert running_values(Own()) == {}
