"""Kill -9 while a checkpoint is written, at many moments: the folder always resumes."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from kd_det.engine import AtomicPaths, Trainer
from tests.toys import batch, distiller_cfg

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
OLD, NEW = 3, 7


class ToyTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return [batch()]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingPaths:
    """A path manager whose files kill the process after so many bytes of the named kind."""

    def __init__(self, suffix: str, size: int) -> None:
        self.suffix, self.left = suffix, size

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        with PathManager.open(path, mode, **kwargs) as f:
            yield _Dying(f, self) if self.suffix in path else f


class _Dying:
    def __init__(self, f: Any, paths: DyingPaths) -> None:
        self.f, self.paths = f, paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self.f, name)

    def write(self, data: Any) -> int:
        size = len(data)
        if size >= self.paths.left:
            self.f.write(data[: self.paths.left])
            self.f.flush()
            die()
        self.paths.left -= size
        return self.f.write(data)


def in_replace(suffix: str, *, after: bool) -> Callable[[], None]:
    """Die right before or after the file of that suffix is renamed into its place."""

    def patch() -> None:
        replace = os.replace

        def dying(source: str, target: str) -> None:
            if target.endswith(suffix) and not after:
                die()
            replace(source, target)
            if target.endswith(suffix):
                die()

        os.replace = dying

    return patch


def saved_by(trainer: Trainer, iteration: int) -> dict[str, torch.Tensor]:
    trainer.iter = iteration
    trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def change(trainer: Trainer) -> None:
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(1)


def in_a_process_that_dies(work: Callable[[], Any]) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)  # it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child survived its moment"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def size(teacher: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("size")
    saved_by(build(teacher, folder), OLD)
    return (folder / f"model_{OLD:07d}.pth").stat().st_size


def build(teacher: tuple[str, str], folder: Path) -> ToyTrainer:
    cfg = distiller_cfg(teacher)
    cfg.OUTPUT_DIR = str(folder)
    return ToyTrainer(cfg)


MOMENTS: dict[str, tuple[Any, int]] = {
    "at the first byte": (0.0, OLD),
    "after a tenth": (0.1, OLD),
    "half-way": (0.5, OLD),
    "at the end of the tensors": (0.95, OLD),
    "before the new file has its name": (in_replace(".pth", after=False), OLD),
    "before the new file is the last one": (in_replace(".pth", after=True), OLD),
    "in the name of the last one": ("last_checkpoint", OLD),
    "before the last one's name is there": (in_replace("last_checkpoint", after=False), OLD),
    "after everything": (in_replace("last_checkpoint", after=True), NEW),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_folder_resumes(moment, teacher, tmp_path, size):
    what, expected = MOMENTS[moment]
    trainer = build(teacher, tmp_path)
    states = {OLD: saved_by(trainer, OLD)}
    change(trainer)
    states[NEW] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    def die_while_saving() -> None:
        if callable(what):
            what()
        else:
            at = (".pth", int(what * size)) if isinstance(what, float) else (what, 5)
            trainer.checkpointer.path_manager = AtomicPaths(DyingPaths(*at))
        saved_by(trainer, NEW)

    in_a_process_that_dies(die_while_saving)
    resumed = build(teacher, tmp_path)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == expected + 1
    torch.testing.assert_close(dict(resumed.model.state_dict()), states[expected], rtol=0, atol=0)


def test_without_atomic_paths_the_folder_would_be_lost(teacher, tmp_path, size):
    """Detectron2's own checkpointer, writing over the file that it resumes from."""
    trainer = build(teacher, tmp_path)
    saved_by(trainer, OLD)

    def die_while_saving() -> None:
        trainer.checkpointer.path_manager = DyingPaths(".pth", size // 2)
        saved_by(trainer, OLD)

    in_a_process_that_dies(die_while_saving)
    with pytest.raises(ValueError, match=r"last checkpoint '.*model_0000003\.pth' cannot be read"):
        build(teacher, tmp_path).resume_or_load(resume=True)
