"""The frozen teacher: what shows of it, and when it reads what."""

import copy
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kd_det.sources import SourceUnavailable, Teacher
from tests import toys
from tests.teachers import INPUTS, TAPS, Owner, assert_same, build, context, started

# -- containment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["files", "model"])
def test_nothing_of_it_shows(files, door):
    if door == "files":
        source = started(files)
    else:
        source = Teacher(model=build(files))
        source.prepare(TAPS)
    owner = Owner(source)
    assert {id(p) for p in owner.parameters()} == {id(p) for p in owner.student.parameters()}
    assert list(owner.state_dict()) == ["student.weight", "student.bias"]
    assert sum(b.numel() for b in owner.buffers()) == 0
    held = {id(m) for m in source.hidden.held.modules()}
    assert not held & {id(m) for m in owner.modules()}


def test_always_in_eval_mode_and_without_gradients(files):
    source = started(files)
    Owner(source).train()
    assert source.training
    assert not any(m.training for m in source.hidden.held.modules())
    assert not any(p.requires_grad for p in source.hidden.held.parameters())
    Owner(source).requires_grad_(True)
    assert not any(p.requires_grad for p in source.hidden.held.parameters())


def test_a_deepcopy_shares_what_is_frozen(files):
    source = started(files)
    twin = copy.deepcopy(Owner(source))
    assert twin.teacher is not source
    assert twin.teacher.hidden.held is source.hidden.held
    assert_close(
        twin.teacher(context(), TAPS).maps["features"]["p3"],
        source(context(), TAPS).maps["features"]["p3"],
    )


def test_releasing_frees_it(files):
    source = started(files)
    source.release()
    assert source.hidden.held is None
    source.release()
    source.prepare(TAPS)
    assert source(context(), TAPS).maps


def test_what_a_student_may_inherit_is_as_in_the_file(files):
    source = started(files, precision="float16")
    theirs = torch.load(files[1])["model"]
    state = source.trained_state()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[k], theirs[k]) for k in theirs)


# -- laziness -------------------------------------------------------------------------------------


def test_shapes_read_no_weights(files, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("kd_det.sources.origin.load_strictly", forbidden)
    source = Teacher(config_file=files[0], weights=files[1])
    shapes = source.shapes(TAPS)
    assert [(s.channels, s.stride) for s in shapes["features"]] == [
        (16, 8 * 2**i) for i in range(5)
    ]
    assert source.hidden.held is None
    with pytest.raises(AssertionError, match="weights were read"):
        source.prepare(TAPS)


def test_measured_taps_must_fire_as_often_as_measured(files):
    source = Teacher(config_file=files[0], weights=files[1])
    tap = "head.cls_score"
    assert [s.calls for s in source.shapes((tap,))[tap]] == [5] * 5
    source.prepare((tap,))
    assert len(source(context(), (tap,)).maps[tap]) == 5

    held = source.hidden.held

    def once_more(backbone, args, maps):
        held.head.cls_score(maps["p3"])

    held.backbone.register_forward_hook(once_more)
    with pytest.raises(RuntimeError, match=r"called 6 time.*should be called 5 time"):
        source(context(), (tap,))


def test_a_missing_weights_file_matters_to_training_only(files):
    source = Teacher(config_file=files[0], weights="nowhere/teacher.pth")
    assert source.shapes(TAPS)
    with pytest.raises(SourceUnavailable, match=r"no weights file 'nowhere/teacher.pth'"):
        source.prepare(TAPS)


def test_a_missing_config_file_matters_to_shapes_only(files):
    source = Teacher(config_file="nowhere/teacher.yaml", weights=files[1])
    assert source.shapes(()) == {}
    with pytest.raises(SourceUnavailable, match=r"no config file 'nowhere/teacher.yaml'.*zoo"):
        source.shapes(TAPS)


def test_preparing_twice_reads_once(files, monkeypatch):
    source = started(files)
    held = source.hidden.held
    monkeypatch.setattr(source._origin, "load", lambda: pytest.fail("read again"))
    source.prepare(TAPS)
    assert source.hidden.held is held


def test_no_global_random_state_is_changed(files):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    source = Teacher(config_file=files[0], weights=files[1])
    source.shapes(TAPS)
    source.prepare(TAPS)
    source(context(), TAPS)
    source.trained_state()
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_lazyconfig_file_is_a_teacher_too(tmp_path):
    config = tmp_path / "teacher.py"
    config.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from tests.toys import toy_fcos\n"
        "model = L(toy_fcos)(fpn=16)\n"
        f"train = dict(init_checkpoint={str(tmp_path / 'teacher.pth')!r})\n"
        "dataloader = dict(train=dict(mapper=dict(image_format='RGB')))\n"
    )
    torch.manual_seed(3)
    model = toys.toy_fcos(fpn=16)
    toys.randomize_norms(model)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    source = started((str(config), ""))
    assert source.input_format == "RGB"
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(INPUTS).tensor
        features = model.backbone(images)
    maps = source(context(input_format="RGB"), TAPS).maps["features"]
    assert_same(maps["p3"], features["p3"])
