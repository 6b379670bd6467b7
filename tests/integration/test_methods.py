"""Every published method on a toy detector: it learns, saves, resumes, and minds the empty case."""

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kd_det import terms
from kd_det.kd_state import KDState
from kd_det.plan import plan_table
from kd_det.registry import TERMS
from tests.steps import seeded, step
from tests.teachers import measured
from tests.toys import batch, distiller_cfg

METHODS = sorted(
    name
    for name, cls in TERMS
    if issubclass(cls, terms.LevelwiseTerm) and cls.__module__.startswith("kd_det.terms.")
)
INPUTS = batch(((96, 128), (64, 80)))


@pytest.fixture(scope="module")
def teacher(teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Or its features are in the hundreds, where FKD's attention is a single cell."""
    return measured(teacher, tmp_path_factory.mktemp("measured"), INPUTS)


def toy(teacher: tuple[str, str], name: str) -> CfgNode:
    """A student with half the teacher's channels, and one term that is nothing but its TYPE."""
    cfg = distiller_cfg(teacher, {"KD": {"TYPE": name}})
    cfg.SOLVER.MAX_ITER = 1000
    return cfg


def learner(teacher: tuple[str, str], name: str) -> nn.Module:
    """In the middle of its run: FGFI imitates nothing in the first 400 iterations."""
    model = seeded(toy(teacher, name))
    model.set_progress(0.5)
    return model


def trained(model: nn.Module, steps: int) -> list[tuple[float, float]]:
    """The term's value and the student's normaliser at every step on one batch; terms frozen."""
    model.terms.requires_grad_(False)
    optimizer = torch.optim.Adam(model.student.parameters(), lr=1e-3)
    seen = []
    for i in range(steps):
        loss = step(model, i, INPUTS)["loss_kd_kd"]
        seen.append((float(loss.detach()), float(model.student.loss_normalizer)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


@pytest.fixture(scope="module")
def settled(teacher: tuple[str, str]) -> float:
    """The number of positive anchors in the batch, where a running mean of it comes to rest."""
    model = learner(teacher, "PI")
    model.student.loss_normalizer = 0.0
    step(model, 0, INPUTS)
    return 10 * model.student.loss_normalizer  # a tenth of the way


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lowers_its_own_loss_with_connectors_frozen(
    teacher: tuple[str, str], settled: float, name: str
) -> None:
    model = learner(teacher, name)
    model.student.loss_normalizer = settled
    values, numbers = zip(*trained(model, 6), strict=True)
    assert numbers == pytest.approx([settled] * 6)
    assert all(0 < v < float("inf") for v in values)
    assert values[-1] < values[0]


def test_a_running_normaliser_divides_what_a_method_lowers(
    teacher: tuple[str, str], settled: float
) -> None:
    """Still on its way from 100 to the batch's few positives, it scales the loss and no more."""
    sums = []
    for start in (100.0, settled):
        model = learner(teacher, "LogitBoxKD")
        model.student.loss_normalizer = start
        seen = trained(model, 4)
        assert seen[0][1] == pytest.approx(0.9 * start + 0.1 * settled)
        sums.append([value * number for value, number in seen])
        assert sums[-1] == sorted(sums[-1], reverse=True)
    assert sums[0][0] == pytest.approx(sums[1][0])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_pulls_the_maps_towards_less(name: str) -> None:
    """Steps on the maps themselves, without a detector in between: every one of them lowers it."""
    term = TERMS.get(name)()
    g = torch.Generator().manual_seed(0)
    s = torch.randn(2, 6, 6, 8, generator=g).requires_grad_()
    t = torch.randn(2, 6, 6, 8, generator=g)
    values = []
    for _ in range(10):
        value = term.compare(s, t, torch.rand(2, 1, 6, 8, generator=g.manual_seed(1)))
        values.append(float(value.detach()))
        (grad,) = torch.autograd.grad(value, s)
        with torch.no_grad():
            s -= 0.05 * grad / grad.abs().max()
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.99 * values[0]


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_idle_and_no_box_is_no_problem(teacher: tuple[str, str], name: str) -> None:
    model = learner(teacher, name)
    for inputs in (INPUTS, batch(((96, 128), (64, 80)), boxes=0)):
        model.zero_grad()
        losses = step(model, 0, inputs)
        assert torch.isfinite(losses["loss_kd_kd"])
        losses["loss_kd_kd"].backward()
        # DDP waits for every parameter that a term owns.
        assert all(p.grad is not None for p in model.terms.parameters())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if name == "FGFI":
        assert losses["loss_kd_kd"] == 0
        assert not any(p.grad.any() for p in model.terms.parameters())
    assert model.wiring.rows["kd"][0].region in plan_table(model, (2, 96, 128))


@pytest.mark.parametrize("name", ["FKD", "ChannelDistillation"])
def test_what_a_method_trains_is_kd_state_and_not_the_students(
    teacher: tuple[str, str], name: str
) -> None:
    cfg = toy(teacher, name)
    model, other = seeded(cfg), seeded(cfg, seed=8)
    assert list(model.state_dict()) == list(model.student.state_dict())
    state = copy.deepcopy(KDState(model).state_dict())
    assert set(state["tensors"]) == {f"terms.{k}" for k in model.terms.state_dict()}
    assert not any("running" in k or "batches" in k for k in state["tensors"])
    before = [p.clone() for p in other.terms.parameters()]
    KDState(other).load_state_dict(state)
    after = list(other.terms.parameters())
    assert all(map(torch.equal, after, model.terms.parameters()))
    assert not all(map(torch.equal, after, before))
    parts = {n.split(".")[1] for n, _ in model.terms.named_parameters()}
    blocks = {"channels", "spatial", "student_blocks", "bridges", "target_blocks"}
    assert parts == {"connectors"} | (blocks if name == "FKD" else set())


@pytest.mark.parametrize("region", ["GTBox", "AnchorIoU", "TeacherScore", "Attention", "TopBoxes"])
def test_any_region_serves_cwd(teacher: tuple[str, str], region: str) -> None:
    cfg = distiller_cfg(teacher, {"KD": {"TYPE": "CWD", "TAP": "features", "REGION": region}})
    model = seeded(cfg)
    losses = step(model, 0, INPUTS)
    assert 0 < losses["loss_kd_kd"].item() < float("inf")
    losses["loss_kd_kd"].backward()
    assert {row.region for row in model.wiring.rows["kd"]} == {region}


def test_two_terms_share_what_a_step_needs_once(teacher: tuple[str, str]) -> None:
    term = {"TYPE": "FitNet", "TAP": "features", "REGION": "TeacherScore"}
    cfg = distiller_cfg(teacher, {"A": term, "B": {"TYPE": "LogitBoxKD"}})
    model = build_model(cfg)
    assert set(model.wiring.all_source_taps["teacher"]) == {
        "features", "cls_logits", "box_deltas",
    }  # fmt: skip
    calls = []
    model.prepare()
    model.sources["teacher"].hidden.held.backbone.register_forward_hook(lambda *_: calls.append(1))
    step(model, 0, INPUTS)
    assert len(calls) == 1
