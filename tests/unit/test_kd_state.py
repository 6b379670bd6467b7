"""The student's checkpoint and what travels beside it."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kd_det.config import student_config
from kd_det.kd_state import KDState
from tests.toys import distiller_cfg, save_teacher

FPN = {"FPN": {"TYPE": "CWD", "TAP": "features"}}  # 8 channels beside 16: five connectors


class Wrapper(nn.Module):
    """As DDP: the module is called ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def distiller(teacher: tuple[str, str]) -> nn.Module:
    return build_model(distiller_cfg(teacher, FPN))


def another(teacher: tuple[str, str], terms: dict | None = None, **kwargs: object) -> nn.Module:
    torch.manual_seed(5)
    return build_model(distiller_cfg(teacher, terms or FPN, **kwargs))


def through_a_file(state: object) -> dict:
    file = io.BytesIO()
    torch.save({"model": state}, file)
    file.seek(0)
    return torch.load(file)["model"]  # weights_only, which is the default


def connectors(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.terms.parameters()]


# Keys -----------------------------------------------------------------------------------------


def test_keys_and_tensors_are_the_students_in_order(distiller: nn.Module) -> None:
    found, expected = distiller.state_dict(), distiller.student.state_dict()
    assert list(found) == list(expected)
    assert all(found[k].data_ptr() == expected[k].data_ptr() for k in expected)
    assert connectors(distiller)


@pytest.mark.parametrize(
    ("wrap", "prefix", "own"),
    [
        (Wrapper, "module.", []),
        (AveragedModel, "module.", ["n_averaged"]),
        (lambda m: Wrapper(Wrapper(m)), "module.module.", []),
        (copy.deepcopy, "", []),
    ],
    ids=["ddp", "averaged", "nested", "deepcopy"],
)
def test_keys_under_wrappers(
    distiller: nn.Module, wrap: Callable, prefix: str, own: list[str]
) -> None:
    found = wrap(distiller).state_dict()
    assert list(found) == own + [prefix + k for k in distiller.student.state_dict()]


def test_the_metadata_is_the_students_and_one_entry(distiller: nn.Module) -> None:
    found, expected = distiller.state_dict()._metadata, distiller.student.state_dict()._metadata
    assert found.keys() == expected.keys()
    assert set(found[""]) - set(expected[""]) == {"kd"}


# Loading --------------------------------------------------------------------------------------


def damaged(student: nn.Module) -> dict[str, torch.Tensor]:
    state = student.state_dict()
    state.pop("head.cls_score.bias")
    state["head.extra.weight"] = torch.zeros(1)
    state["student.head.cls_score.weight"] = torch.zeros(1)
    return state


def test_missing_and_unexpected_keys_are_stocks(distiller: nn.Module) -> None:
    state = damaged(distiller.student)
    found = distiller.load_state_dict(state, strict=False)
    expected = distiller.student.load_state_dict(state, strict=False)
    assert found == expected
    assert found.missing_keys == ["head.cls_score.bias"]
    assert len(found.unexpected_keys) == 2
    with pytest.raises(RuntimeError, match=r'(?s)Unexpected.*"head.extra.weight".*Missing|Missing'):
        distiller.load_state_dict(state)


def test_missing_and_unexpected_keys_are_stocks_in_a_wrapper(distiller: nn.Module) -> None:
    state = {f"module.{k}": v for k, v in damaged(distiller.student).items()}
    for _ in range(2):  # nothing of the first loading is left behind
        found = Wrapper(distiller).load_state_dict(state, strict=False)
        expected = Wrapper(distiller.student).load_state_dict(state, strict=False)
        assert sorted(found.missing_keys) == sorted(expected.missing_keys)
        assert sorted(found.unexpected_keys) == sorted(expected.unexpected_keys)
    with pytest.raises(RuntimeError, match=r"head\.extra\.weight"):
        Wrapper(distiller).load_state_dict(state)


def test_values_arrive_in_a_wrapper(distiller: nn.Module, teacher: tuple[str, str]) -> None:
    other = another(teacher)
    result = Wrapper(other).load_state_dict(through_a_file(Wrapper(distiller).state_dict()))
    assert result.missing_keys == result.unexpected_keys == []
    torch.testing.assert_close(
        dict(other.student.state_dict()), dict(distiller.student.state_dict()), rtol=0, atol=0
    )
    torch.testing.assert_close(connectors(other), connectors(distiller), rtol=0, atol=0)


def test_a_checkpointer_reports_as_for_the_plain_student(
    distiller: nn.Module, teacher: tuple[str, str], tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file with another class count, one missing and one extra entry."""
    state = dict(damaged(distiller.student))
    del state["student.head.cls_score.weight"]
    state["head.cls_score.weight"] = torch.zeros(7, 8, 3, 3)
    torch.save({"model": state}, tmp_path / "x.pth")
    plain = build_model(student_config(distiller_cfg(teacher, FPN)))
    reports, results = [], []
    for model in (distiller, plain):
        results.append(DetectionCheckpointer(model)._load_model({"model": dict(state)}))
        caplog.clear()
        DetectionCheckpointer(model).load(str(tmp_path / "x.pth"))
        reports.append([r.getMessage() for r in caplog.records])
    assert results[0] == results[1]
    assert [key for key, _, _ in results[0].incorrect_shapes] == ["head.cls_score.weight"]
    assert reports[0] == reports[1]


def test_what_the_distiller_lacks_is_the_students(distiller: nn.Module) -> None:
    assert distiller.head is distiller.student.head
    assert distiller.device == distiller.student.device
    with pytest.raises(AttributeError, match="no attribute 'haed'"):
        _ = distiller.haed


# The kd state ---------------------------------------------------------------------------------


def test_it_survives_the_safe_loader(distiller: nn.Module, teacher: tuple[str, str]) -> None:
    loaded = through_a_file(distiller.state_dict())
    assert list(loaded) == list(distiller.student.state_dict())
    other = another(teacher)
    assert not all(map(torch.equal, connectors(other), connectors(distiller)))
    other.load_state_dict(loaded)
    torch.testing.assert_close(connectors(other), connectors(distiller), rtol=0, atol=0)
    assert other.check_resume(3) is True


def test_it_is_not_in_the_model_beside_a_checkpointable(distiller: nn.Module) -> None:
    state = KDState(distiller)
    assert "kd" not in distiller.state_dict()._metadata[""]
    assert state.state_dict()["tensors"].keys() == distiller.kd_state_dict()["tensors"].keys()


def test_the_checkpointable_round_trip(distiller: nn.Module, teacher: tuple[str, str]) -> None:
    saved = through_a_file(KDState(distiller).state_dict())
    other = another(teacher)
    KDState(other).load_state_dict(saved)
    torch.testing.assert_close(connectors(other), connectors(distiller), rtol=0, atol=0)
    assert other.check_resume(3) is True


@pytest.mark.parametrize(
    "terms",
    [
        {"FPN": {**FPN["FPN"], "LEVELS": ["p3"]}},
        {"OTHER": FPN["FPN"]},
        {**FPN, "LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"}},
        {"FPN": {**FPN["FPN"], "CONNECTOR": {"TYPE": "Conv", "KERNEL": 3}}},
    ],
    ids=["levels", "name", "more", "shape"],
)
def test_changed_terms_are_not_restored(
    distiller: nn.Module, teacher: tuple[str, str], terms: dict
) -> None:
    other = another(teacher, terms)
    before = connectors(other)
    other.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(connectors(other), before, rtol=0, atol=0)
    torch.testing.assert_close(
        dict(other.student.state_dict()), dict(distiller.student.state_dict()), rtol=0, atol=0
    )
    assert other.check_resume(0) is False  # a new run from this checkpoint is fine
    with pytest.raises(RuntimeError, match=r"with other sources, terms or shapes.*TrainerMixin"):
        other.check_resume(3)
    with pytest.raises(ValueError, match=r"cannot be restored: .* MODEL\.WEIGHTS"):
        KDState(other).load_state_dict(distiller.kd_state_dict())


def test_a_checkpoint_without_kd_state_does_not_resume(distiller: nn.Module) -> None:
    distiller.load_state_dict(distiller.student.state_dict())
    with pytest.raises(RuntimeError, match=r"no kd state came with.*kd_det\.TrainerMixin"):
        distiller.check_resume(3)
    assert distiller.check_resume(0) is False
    assert distiller.check_resume(None) is False


def test_without_anything_to_restore_a_resume_needs_nothing(tmp_path) -> None:
    distiller = build_model(distiller_cfg(save_teacher(tmp_path), FPN))
    assert connectors(distiller) == []
    assert distiller.check_resume(3) is True


# Fingerprints ---------------------------------------------------------------------------------


def resumed_with(saved: object, teacher: tuple[str, str], terms: dict) -> nn.Module:
    other = another(teacher, terms)
    other.load_state_dict(saved)
    other.prepare()
    return other


@pytest.mark.parametrize("changed_terms", [False, True])
def test_another_teacher_on_resume_is_an_error(tmp_path, changed_terms: bool) -> None:
    first, second = save_teacher(tmp_path / "a"), save_teacher(tmp_path / "b", seed=2)
    distiller = build_model(distiller_cfg(first, FPN))
    distiller.prepare()
    saved = through_a_file(distiller.state_dict())
    terms = {"FPN": {**FPN["FPN"], "LEVELS": ["p3"]}} if changed_terms else FPN
    for teacher, same in [(first, True), (second, False)]:
        other = resumed_with(saved, teacher, terms)
        assert other.check_resume(3) is True
        if same:
            other.check_fingerprint("teacher", other.sources["teacher"])
        else:
            with pytest.raises(ValueError, match=r"Source 'teacher' is not the one.*fingerprint"):
                other.check_fingerprint("teacher", other.sources["teacher"])
    other = resumed_with(saved, second, terms)
    assert other.check_resume(0) is False  # a new run
    other.check_fingerprint("teacher", other.sources["teacher"])


def test_an_unread_teacher_keeps_the_fingerprint_of_the_checkpoint(
    teacher: tuple[str, str],
) -> None:
    distiller = another(teacher)
    distiller.prepare()
    then = distiller.kd_state_dict()["sources"]["teacher"]
    assert len(then) == 64
    other = another(teacher)
    assert other.kd_state_dict()["sources"]["teacher"] == ""
    other.load_state_dict(distiller.state_dict())
    other.check_resume(3)
    assert other.kd_state_dict()["sources"]["teacher"] == then
