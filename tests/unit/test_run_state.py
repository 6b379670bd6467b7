"""What a run takes along, and which checkpoints it refuses to continue from."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from kd_det.engine.resume import RunState, check_last_checkpoint
from kd_det.kd_state import KDState
from tests.selves import PI, self_cfg
from tests.steps import step
from tests.toys import distiller_cfg, toy_cfg, toy_fcos


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def reloaded(state: dict, tmp_path: Path) -> dict:
    torch.save(state, tmp_path / "state.pth")
    return torch.load(tmp_path / "state.pth")  # PyTorch's safe loader


class Position:
    """A loader's position, without a loader."""

    def __init__(self, drawn: int = 0) -> None:
        self.state = {"drawn": drawn, "waiting": []}

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def test_random_states_are_taken_up_before_the_first_step_only(tmp_path):
    random.gauss(0, 1)  # the second of a pair is kept for the next call
    np.random.randn()  # noqa: NPY002
    state = reloaded(RunState(nn.Identity(), None).state_dict(), tmp_path)
    expected = [drawn(), random.gauss(0, 1), np.random.randn()]  # noqa: NPY002
    run = RunState(nn.Identity(), None)
    run.load_state_dict(state)
    random.seed(9)
    torch.manual_seed(9)
    drawn()
    run.before_step()
    assert [drawn(), random.gauss(0, 1), np.random.randn()] == expected  # noqa: NPY002
    following = drawn()
    run.before_step()
    assert drawn() != following


def test_saved_before_its_first_step_a_resumed_run_is_where_it_was(tmp_path):
    state = RunState(nn.Identity(), Position(4)).state_dict()
    run = RunState(nn.Identity(), Position())
    run.load_state_dict(state)
    drawn()
    again = run.state_dict()
    torch.testing.assert_close(
        again["ranks"][0]["rng"]["torch"], state["ranks"][0]["rng"]["torch"], rtol=0, atol=0
    )
    assert again["ranks"][0]["loader"]["drawn"] == 4


def test_what_is_done_aside_reaches_neither_the_next_step_nor_a_checkpoint():
    student = build_model(toy_cfg())
    run = RunState(student, None)
    step(student, 0)
    value, state = student.loss_normalizer, torch.get_rng_state()
    with run.aside(0):
        drawn()
        step(student, 0)  # as PreciseBN does
        saved = run.state_dict()["ranks"][0]
    assert student.loss_normalizer == value == saved["running"][0]["loss_normalizer"]
    for found in (torch.get_rng_state(), saved["rng"]["torch"]):
        assert torch.equal(found, state)
    drawn()  # the end of a run evaluates, and saves, once more
    assert torch.equal(run.state_dict()["ranks"][0]["rng"]["torch"], state)
    run.before_step()
    assert not torch.equal(run.state_dict()["ranks"][0]["rng"]["torch"], state)


def test_numbers_drawn_aside_are_new_at_every_iteration_and_come_again_in_a_resumed_run():
    run = RunState(nn.Identity(), None)
    state, numbers = run.state_dict(), {}
    for iteration in range(3):
        with run.aside(iteration):
            numbers[iteration] = drawn()
    assert all(len(set(of_one_kind)) == 3 for of_one_kind in zip(*numbers.values(), strict=True))
    torch.manual_seed(9)
    resumed = RunState(nn.Identity(), None)
    resumed.load_state_dict(state)
    resumed.before_step()
    with resumed.aside(2):
        assert drawn() == numbers[2]


@pytest.mark.parametrize("build", [lambda: build_model(toy_cfg()), toy_fcos])
def test_loss_normalizer_goes_along(build, tmp_path):
    student = build()
    step(student, 0)
    value = student.loss_normalizer
    holder = nn.ModuleDict({"wrapped": build()})
    run = RunState(holder, None)
    run.load_state_dict(reloaded(RunState(student, None).state_dict(), tmp_path))
    run.before_step()
    assert holder["wrapped"].loss_normalizer == value != 100


def ranks(monkeypatch: pytest.MonkeyPatch, world: int, rank: int) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: world)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)


def test_every_process_gets_its_own(monkeypatch):
    runs = [RunState(nn.Identity(), Position(10 + r)) for r in range(2)]
    states = []
    for r in range(2):
        torch.manual_seed(r)
        states.append(runs[r].state_dict()["ranks"][0])
    monkeypatch.setattr(comm, "gather", lambda state: states)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    runs[0].gather()
    saved = runs[0].state_dict()
    for r in range(2):
        ranks(monkeypatch, 2, r)
        run = RunState(nn.Identity(), Position())
        run.load_state_dict(saved)
        run.before_step()
        assert run.loader.state["drawn"] == 10 + r
        found = torch.rand(())
        torch.manual_seed(r)
        assert found == torch.rand(())
    runs[0].before_step()  # the next step begins: what was gathered is out of date
    assert len(runs[0].state_dict()["ranks"]) == 1


@pytest.mark.parametrize(("then", "now", "position"), [(2, 1, 20), (1, 2, 5), (4, 2, 20)])
def test_another_number_of_processes_goes_on_in_the_shuffle(
    then, now, position, monkeypatch, caplog
):
    own = RunState(nn.Identity(), Position(10)).state_dict()["ranks"][0]
    ranks(monkeypatch, now, now - 1)
    run = RunState(nn.Identity(), Position())
    before = torch.get_rng_state()
    with caplog.at_level("WARNING"):
        run.load_state_dict({"world_size": then, "ranks": [own] * then})
    run.before_step()
    assert run.loader.state["drawn"] == position
    assert torch.equal(torch.get_rng_state(), before)
    assert f"of {then} of {then} process(es), and this run has {now}" in caplog.text


# --- which checkpoints are refused


def saved(folder: Path, model: nn.Module, **checkpointables: object) -> None:
    DetectionCheckpointer(model, str(folder), **checkpointables).save("model_0000003")


def check(folder: Path, model: nn.Module) -> None:
    distilled = hasattr(model, "terms")
    check_last_checkpoint(DetectionCheckpointer(model, str(folder)), model, distilled=distilled)


@pytest.mark.parametrize("as_checkpointable", [True, False])
def test_its_own_checkpoint_is_accepted(teacher, tmp_path, as_checkpointable):
    model = build_model(distiller_cfg(teacher))
    saved(tmp_path, model, **({"kd": KDState(model)} if as_checkpointable else {}))
    check(tmp_path, build_model(distiller_cfg(teacher)))
    saved(tmp_path, model.student)
    check(tmp_path, model.student)
    saved(tmp_path, nn.parallel.DataParallel(model.student))
    check(tmp_path, model.student)


@pytest.mark.parametrize(
    ("another", "words"),
    [
        ({"classes": 4}, r"0 are not in .* and 2 have another shape \(head\.cls_score\.weight is"),
        ({"fpn": 16}, r"have another shape .*this run's student"),
        ({"arch": "GeneralizedRCNN"}, r"are not in .*model_0000003\.pth"),
    ],
)
def test_of_another_model(another, words, tmp_path):
    saved(tmp_path, build_model(toy_cfg(**another)))
    with pytest.raises(ValueError, match=words) as e:
        check(tmp_path, build_model(toy_cfg()))
    assert "choose another OUTPUT_DIR" in str(e.value)


def test_with_and_without_distillation(teacher, tmp_path):
    distiller = build_model(distiller_cfg(teacher))
    saved(tmp_path, distiller.student)
    with pytest.raises(ValueError, match=r"written without distillation, this run is with"):
        check(tmp_path, distiller)
    saved(tmp_path, distiller)
    with pytest.raises(ValueError, match=r"written with distillation, this run is without"):
        check(tmp_path, distiller.student)


def test_with_another_learner(tmp_path):
    """Same terms, sources and shapes; or another of two alike networks as the run's."""
    terms = {"BACK": {**PI, "SOURCE": "STUDENT", "LEARNER": "PEER"}}
    own = self_cfg({"PEER": {"TYPE": "Peer"}, "MORE": {"TYPE": "Peer"}}, terms)
    saved(tmp_path, build_model(own))
    taught = own.clone()
    taught.KD.TERMS.BACK.LEARNER = "MORE"
    with pytest.raises(ValueError, match="learner or shape of term back"):
        check(tmp_path, build_model(taught))
    own.KD.EXPORT_PEER = "PEER"
    with pytest.raises(ValueError, match=r"'student' is exported, and in this run 'peer' \(KD\.EX"):
        check(tmp_path, build_model(own))


@pytest.mark.parametrize("as_checkpointable", [True, False])
def test_with_other_terms(teacher, tmp_path, as_checkpointable):
    model = build_model(distiller_cfg(teacher))
    saved(tmp_path, model, **({"kd": KDState(model)} if as_checkpointable else {}))
    other = build_model(distiller_cfg(teacher, {"NECK": {"TYPE": "CWD", "TAP": "features"}}))
    with pytest.raises(ValueError, match=r"with terms fpn, logits \(this run has neck\)"):
        check(tmp_path, other)


def test_a_truncated_one(tmp_path):
    model = build_model(toy_cfg())
    saved(tmp_path, model)
    (tmp_path / "model_0000001.pth").write_bytes(b"")
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot be read .*there are: model_0000001\.pth"):
        check(tmp_path, model)
