"""What a step with distillation runs beside the plain one: counted, never timed."""

from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from kd_det import Distiller, Teacher, terms
from kd_det.config import student_config
from kd_det.context import Context
from kd_det.plan import plan_table
from kd_det.regions import Padding
from kd_det.schedules import Constant
from kd_det.sources import Targets
from tests.parts import L2
from tests.steps import FPN, gradients, seeded, step, with_schedule
from tests.toys import batch, distiller_cfg, toy_cfg

LOGITS = {"LOGITS": {"TYPE": "CWD", "TAP": "cls_logits"}}
INPUTS = batch(((64, 64), (50, 60)))  # with padding


def calls(model: nn.Module) -> Counter[str]:
    """Counts the calls of every module, by path, from now on."""
    counter: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: counter.update([name]))
    return counter


# The student's own step ------------------------------------------------------------------------


def test_the_students_modules_are_called_as_in_its_plain_step(teacher: tuple[str, str]) -> None:
    cfg = distiller_cfg(teacher, FPN | LOGITS)
    model, plain = seeded(cfg), seeded(student_config(cfg))
    step(model, 0)  # the first one reads the teacher
    ours, theirs = calls(model.student), calls(plain)
    step(model, 1)
    step(plain, 1)
    assert ours == theirs
    assert ours["head.cls_score"] == 5


def test_terms_on_one_tap_share_one_hook_and_one_run(
    teacher: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"AGAIN": {**FPN["FPN"], "TAU": 4.0}, "MORE": {**LOGITS["LOGITS"], "TAU": 2.0}}
    model = build_model(distiller_cfg(teacher, FPN | LOGITS | again))
    model.prepare()
    held = model.sources["teacher"].hidden.held
    ran = calls(held)
    hooks: Counter[int] = Counter()
    register = nn.Module.register_forward_hook

    def counting(module: nn.Module, *a: object, **k: object) -> object:
        hooks[id(module)] += 1
        return register(module, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "register_forward_hook", counting)
    losses = step(model, 0)
    tapped = [m for d in (model.student, held) for m in (d.backbone, d.head.cls_score)]
    assert hooks == {id(m): 1 for m in tapped}
    assert (ran["backbone"], ran["head.cls_score"]) == (1, 5)
    assert {"loss_kd_fpn", "loss_kd_again", "loss_kd_logits", "loss_kd_more"} <= losses.keys()
    modules = [*model.modules(), *held.modules()]
    assert not any(m._forward_hooks for m in modules)


# Inference mode --------------------------------------------------------------------------------


def distiller(teacher: tuple[str, str], **parts: terms.Term) -> Distiller:
    torch.manual_seed(7)
    return Distiller(
        student=build_model(toy_cfg()),
        sources={"teacher": Teacher(config_file=teacher[0], weights=teacher[1])},
        terms=parts,
        max_iter=100,
    )


def watched(model: Distiller) -> list[tuple[Context, Targets]]:
    """The teacher's context and targets of every step from now on."""
    seen: list[tuple[Context, Targets]] = []
    model.sources["teacher"].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    return seen


def inference_maps(model: Distiller) -> set[bool]:
    """Runs a step forward and backward; whether the teacher's maps were inference tensors."""
    seen = watched(model)
    losses = step(model, 0, INPUTS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    _, targets = seen[0]
    return {x.is_inference() for maps in targets.maps.values() for x in maps.values()}


@pytest.mark.parametrize(
    "options",
    [{}, {"standardize": True}, {"channel_weight": "teacher_max_prob"}, {"source_tap": "res4"}],
)
def test_cwd_saves_no_target_in_any_of_its_options(
    teacher: tuple[str, str], options: dict[str, object]
) -> None:
    one_level = {"tap": "res3"} if "source_tap" in options else {}  # resized: another stride
    assert inference_maps(distiller(teacher, a=terms.CWD(**one_level, **options))) == {True}


def test_gradients_are_those_without_inference_mode(teacher: tuple[str, str]) -> None:
    found = []
    for saved in (True, False):
        model = distiller(teacher, a=terms.CWD(standardize=True), b=terms.CWD(tap="cls_logits"))
        model.sources["teacher"].targets_saved = saved
        assert inference_maps(model) == {not saved}
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class Louder(terms.CWD):
    """A subclass with arithmetic of its own, which saves the target."""

    def compare(self, student: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
        return super().compare(student, target, region) + (student * target).mean()


@pytest.mark.parametrize("other", [L2, Louder])
def test_one_term_that_does_not_say_so_is_enough(teacher: tuple[str, str], other: type) -> None:
    assert inference_maps(distiller(teacher, a=terms.CWD(), b=other())) == {False}


def test_a_target_that_is_saved_after_all_is_an_error_and_no_wrong_gradient(
    teacher: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Louder, "saves_target", False)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        inference_maps(distiller(teacher, a=Louder()))


# Every k-th step -------------------------------------------------------------------------------


def test_between_its_iterations_a_term_is_an_attached_zero_and_the_teacher_rests(
    teacher: tuple[str, str],
) -> None:
    model = build_model(distiller_cfg(teacher, with_schedule(EVERY=3)))
    model.prepare()
    ran = calls(model.sources["teacher"].hidden.held)
    values = []
    for iteration in range(6):
        loss = step(model, iteration)["loss_kd_fpn"]
        assert loss.requires_grad
        values.append(float(loss.detach()))
        assert ran["backbone"] == sum(v > 0 for v in values)
    assert [v > 0 for v in values] == [False, True, False, False, True, False]
    plain = build_model(distiller_cfg(teacher, FPN))
    plain.load_state_dict(model.state_dict())
    plain.terms.load_state_dict(model.terms.state_dict())
    assert values[4] == pytest.approx(float(step(plain, 4)["loss_kd_fpn"].detach()), rel=1e-4)


def test_terms_of_one_source_rest_together_wherever_they_start(teacher: tuple[str, str]) -> None:
    model = distiller(
        teacher,
        a=terms.CWD(schedule=Constant(every=2)),
        b=terms.CWD(tap="cls_logits", schedule=Constant(every=2, start_iter=3)),
    )
    model.prepare()
    ran = calls(model.sources["teacher"].hidden.held)
    for iteration in range(8):
        step(model, iteration)
    assert ran["backbone"] == 4


# A smaller teacher's image ---------------------------------------------------------------------


def test_levels_meet_by_the_students_pixels_when_the_teacher_sees_less(
    teacher: tuple[str, str],
) -> None:
    cfg = distiller_cfg(teacher, FPN | LOGITS)
    cfg.merge_from_list(["KD.SOURCES.TEACHER.SCALE", "0.5"])
    model = build_model(cfg)
    pairs = [(r.level, r.target, r.stride) for r in model.wiring.rows["fpn"]]
    # P6 and P7 of both are of one kind; the teacher's P5 is not what the student's P6 is.
    assert pairs == [
        ("p4", "features.p3", 16),
        ("p5", "features.p4", 32),
        ("p7", "features.p6", 128),
    ]
    assert [r.level for r in model.wiring.rows["logits"]] == ["p4", "p5", "p6", "p7"]
    table = plan_table(model, (2, 64, 64))
    assert "features.p3" in table
    assert "1/16" in table
    inputs = batch(((256, 256), (130, 200)))
    seen = watched(model)
    losses = step(model, 0, inputs)
    sum(losses.values()).backward()
    assert float(losses["loss_kd_fpn"].detach()) > 0
    context, targets = seen[0]
    small, full = targets.maps["features"]["p3"], context.student_maps["features"]["p4"]
    assert small.shape[-2:] == full.shape[-2:] == (16, 16)
    region = Padding()(context, full, small, 16)
    assert region is not None
    rows, columns = region[1, 0].nonzero().T
    assert (int(rows.max()) + 1, int(columns.max()) + 1) == (9, 13)  # 130 and 200 pixels of 16
