"""A user's mistake ends in one sentence and status 2, everything else in a traceback."""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.engine.train_loop import TrainerBase
from torch import nn

from kd_det.engine import launch, plain_errors
from kd_det.engine.errors import is_plain, sentence
from kd_det.regions import Padding
from kd_det.registry import TERMS
from kd_det.schedules import Warmup
from kd_det.sources import Teacher
from kd_det.sources.model_config import ModelConfig
from kd_det.taps import Recorder, Tap
from kd_det.terms import Term

ROOT = Path(__file__).resolve().parents[2]


def arguments(*words: str) -> argparse.Namespace:
    return default_argument_parser().parse_args(words)


def mistake(_: object = None) -> None:
    Warmup(warmup_iters=-3)


def unknown(_: object = None) -> None:
    TERMS.get("CWDD")


def no_such_file(_: object = None) -> None:
    ModelConfig("no/such.yaml", what="The teacher")


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (mistake, "kd_det: Warmup needs warmup_iters >= 1, but got -3.\n"),
        (unknown, "kd_det: There is no term called 'CWDD'. Did you mean 'CWD'? Known: "),
        (no_such_file, "kd_det: The teacher: there is no config file 'no/such.yaml'. Looked"),
    ],
)
def test_a_mistake_is_a_sentence(fail, words, capsys):
    with pytest.raises(SystemExit) as e:
        launch(fail, arguments())
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert said.endswith("KD_DET_TRACEBACK=1 in the environment: the traceback.)\n")
    assert "Traceback" not in said
    assert said.count("kd_det: ") == 1


def by_a_dict(_):
    Recorder(nn.Identity(), []).maps(Tap("features", "backbone"))


def by_unpacking(_):
    Padding()(SimpleNamespace(image_sizes=[(1, 2, 3)]), None, torch.ones(1, 1, 2, 2), 1)


def by_pytorch(_):
    nn.Linear(2, 2).load_state_dict({})


def by_the_test(_):
    raise ValueError("of another's code")


def by_the_base(_):
    Term().wire({}, {})  # NotImplementedError: a developer's


def by_assertion(_):
    Teacher(model=nn.Identity())(None, ())


@pytest.mark.parametrize(
    "fail", [by_a_dict, by_unpacking, by_pytorch, by_the_test, by_the_base, by_assertion]
)
def test_everything_else_keeps_its_traceback(fail):
    # SystemExit is none of these.
    with pytest.raises((LookupError, TypeError, ValueError, RuntimeError, AssertionError)):
        launch(fail, arguments())


@pytest.mark.parametrize("value", ["1", "yes"])
def test_the_traceback_is_there_when_asked_for(monkeypatch, value):
    monkeypatch.setenv("KD_DET_TRACEBACK", value)
    with pytest.raises(ValueError, match="warmup_iters"):
        launch(mistake, arguments())


def test_a_result_comes_through():
    assert launch(lambda args: args.num_gpus + 1, arguments("--num-gpus", "0")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpus_that_are_not_there_are_a_sentence_too(capsys):
    with pytest.raises(SystemExit):
        launch(mistake, arguments("--num-gpus", "2"))
    assert "kd_det: --num-gpus 2 was asked for, but PyTorch sees no GPU" in capsys.readouterr().err


def test_a_key_error_has_no_quotes_around_it():
    assert sentence(KeyError('It\'s "so"')) == 'It\'s "so"'
    assert sentence(KeyError()) == ""
    assert not is_plain(ValueError("never raised"))


class Loop(TrainerBase):
    def before_train(self):
        mistake()


def test_the_training_loop_says_it_once_and_the_log_file_has_the_traceback(tmp_path, capsys):
    logger = logging.getLogger("kd_det")
    handlers = [logging.FileHandler(tmp_path / "log.txt"), logging.StreamHandler(sys.stdout)]
    loop = logging.getLogger("detectron2.engine.train_loop")
    for handler in handlers:
        logger.addHandler(handler)
        loop.addHandler(handler)
    try:
        with pytest.raises(SystemExit), plain_errors():
            Loop().train(0, 1)
        with plain_errors():
            loop.error("Exception during training:", exc_info=ValueError("another's"))
        assert not loop.filters
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            loop.removeHandler(handler)
            handler.close()
    said = capsys.readouterr()
    assert "Exception during training" in said.out  # that of the ValueError
    assert "warmup_iters" not in said.out
    assert said.err.count("warmup_iters") == 1
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Traceback") == 1
    assert "in mistake" in log


SCRIPT = """
import kd_det
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from kd_det.engine import launch
from kd_det.schedules import Warmup
def main(args):
    assert comm.get_world_size() == 2
    Warmup(warmup_iters=-3)
if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
"""


@pytest.mark.dist
def test_every_process_under_torchrun_says_its_sentence(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(script)]  # fmt: skip
    child = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode != 0
    said = [line for line in child.stderr.splitlines() if line.startswith("kd_det")]
    assert said
    # torchrun ends the second process once the first is gone.
    for line in said:
        assert line.removeprefix("kd_det").removeprefix(" (process 1)").startswith(": Warmup needs")
    assert "exitcode  : 2" in child.stderr
    assert 'train.py", line' not in child.stderr


def child_of(number: int, folder: str) -> None:
    """What Detectron2's launch runs in a process of its own."""
    try:
        with plain_errors():
            mistake()
    except SystemExit as e:
        Path(folder, f"{number}.json").write_text(json.dumps(e.code))
        raise


@pytest.mark.dist
def test_a_spawned_process_leaves_status_2(tmp_path, monkeypatch):
    def spawn(main, *_, args, **__):
        # Forked, where Detectron2 spawns, for the sake of time.
        torch.multiprocessing.start_processes(
            child_of, (str(tmp_path),), nprocs=2, start_method="fork"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys.modules["kd_det.engine.launch"], "d2_launch", spawn)
    with pytest.raises(SystemExit) as e:
        launch(mistake, arguments("--num-gpus", "2"))
    assert e.value.code == 2
    assert {json.loads(p.read_text()) for p in tmp_path.glob("*.json")} == {2}
