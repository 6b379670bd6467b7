"""
A distilled training step beside the plain student's, and where its time goes.

A step is forward, backward and update, on one batch that stays in memory, with random weights. The
learning rate is next to nothing: what the weights are would otherwise depend on how often was
measured.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from benchmarks.command import Options, main
from benchmarks.memory import measure_memory
from benchmarks.models import build_random, make_batch, read_config
from benchmarks.report import Report, Table
from benchmarks.turns import Samples, ratios, spread, take_turns
from kd_det import Distiller
from kd_det.context import Context, with_images_on
from kd_det.tools.runs import Trainer

PLAIN, TEACHER, KD = "plain step", "teacher's forward", "distilled step"
WARMUP = 1


class Setting(NamedTuple):
    """
    Attributes:
        what: its name in the table.
        config: the distilled student's file.
        teacher: the teacher's file.
        images: number, height and width of the batch's images.
        optimizer: builds it from config and model.
    """

    what: str
    config: str
    teacher: str
    images: tuple[int, int, int]
    optimizer: Callable[[CfgNode, nn.Module], torch.optim.Optimizer] = build_optimizer


_STUDENT = "COCO-Detection/retinanet_R_50_FPN_1x"
_R101 = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
QUICKSTART = Setting(
    "quickstart",
    "quickstart/distilled.yaml",
    "quickstart/teacher.yaml",
    (8, 64, 64),
    Trainer.build_optimizer,
)
R50 = Setting(
    "R50 from R50, FPN + logits", f"{_STUDENT}_cwd_R_101.yaml", f"{_STUDENT}.yaml", (2, 480, 640)
)
SETTINGS = {"short": (QUICKSTART, R50._replace(images=(2, 240, 320))), "full": (QUICKSTART, R50)}
ON_GPU = (
    Setting("R50 from R101, FPN", f"{_STUDENT}_cwd_R_101_features.yaml", _R101, (2, 800, 1344)),
    Setting("R50 from R101, FPN + logits", f"{_STUDENT}_cwd_R_101.yaml", _R101, (2, 800, 1344)),
)


class Learner:
    """A model in training with its optimizer and one batch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[dict[str, Any]]
    ) -> None:
        self.model = model.train()
        self.optimizer = optimizer
        self.inputs = inputs
        self.storage = EventStorage(0)

    def step(self) -> None:
        """What Detectron2's trainer does between two batches."""
        with self.storage:
            losses = self.model(self.inputs)
            self.optimizer.zero_grad()
            sum(losses.values()).backward()
            self.optimizer.step()
            self.storage.step()


class Stopwatches:
    """Times, while it is entered, every call of the modules of some groups, by hooks."""

    def __init__(self, groups: Mapping[str, Iterable[nn.Module]], device: torch.device) -> None:
        self._groups = {name: list(modules) for name, modules in groups.items()}
        self._cuda = device.type == "cuda"
        self._marks: dict[nn.Module, list[Any]] = defaultdict(list)
        self._handles: list[Any] = []

    def __enter__(self) -> "Stopwatches":
        for module in dict.fromkeys(chain(*self._groups.values())):  # one mark each
            self._handles.append(module.register_forward_pre_hook(self._mark))
            self._handles.append(module.register_forward_hook(self._mark))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self, module: nn.Module, *_: object) -> None:
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks[module].append(now)

    def seconds(self, last: int) -> Samples:
        """By group the sum over its modules, in each of the ``last`` rounds of calls."""
        return {
            name: [sum(each) for each in zip(*map(self._calls, modules), strict=True)][-last:]
            for name, modules in self._groups.items()
        }

    def _calls(self, module: nn.Module) -> list[float]:
        marks = self._marks[module]
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]


def run(options: Options, settings: Sequence[Setting] | None = None) -> Report:
    """Measure every setting."""
    if settings is None:
        settings = SETTINGS["short" if options.short else "full"]
        if options.device.type == "cuda":
            settings = (*settings, *ON_GPU)
    report = Report()
    headers = ["setting", PLAIN, TEACHER, KD, "distilled / plain"]
    headers += ["distilled / (plain + teacher)", "peak memory / plain's"]
    whole = Table("Steps, ms", headers, [])
    headers = ["setting", KD, "teacher", "terms, forward", "rest", "rest / plain"]
    inside = Table("Inside of the distilled step, ms", headers, [])
    report.tables = [whole, inside]
    for setting in settings:
        samples, parts, memory = _measure(setting, options)
        n, h, w = setting.images
        title = f"{setting.what}, {n} images of {h}x{w}"
        times = [spread(samples[name]).text(1, 1e3) for name in (PLAIN, TEACHER, KD)]
        times += [spread(ratios(samples, KD, PLAIN)).text()]
        times += [spread(ratios(samples, KD, PLAIN, TEACHER)).text()]
        whole.rows.append([title, *times, f"{memory[KD] / memory[PLAIN]:.2f}"])
        everything = {**samples, **parts}
        shares = [spread(everything[name]).text(1, 1e3) for name in (KD, *parts)]
        inside.rows.append([title, *shares, spread(ratios(everything, "rest", PLAIN)).text()])
        report.samples[title] = {"seconds": samples, "parts": parts, "peak_bytes": memory}
    report.notes.append("The rest is the student: its forward, all of the backward, the update.")
    return report


def _measure(setting: Setting, options: Options) -> tuple[Samples, Samples, dict[str, int]]:
    """Seconds of the steps, of the parts of the distilled one, and peak bytes of the steps."""
    plain, kd = learners(setting, options.device)
    distiller = kd.model
    assert isinstance(distiller, Distiller)
    variants = {PLAIN: plain.step, TEACHER: teacher_forward(distiller, kd.inputs), KD: kd.step}
    groups = {"sources": distiller.sources.values(), "terms": distiller.terms.values()}
    with Stopwatches(groups, options.device) as watches:
        samples = take_turns(variants, options.repeats, options.device, warmup=WARMUP)
    parts = watches.seconds(options.repeats)
    of_parts = zip(samples[KD], parts["sources"], parts["terms"], strict=True)
    parts["rest"] = [step - sources - terms for step, sources, terms in of_parts]
    memory = {}
    for name, learner in ((PLAIN, plain), (KD, kd)):
        learner.optimizer.zero_grad()
        memory[name] = measure_memory(learner.step, options.device).peak
        learner.optimizer.zero_grad()
    return samples, parts, memory


def learners(setting: Setting, device: torch.device) -> tuple[Learner, Learner]:
    """The plain student and the distilled one."""
    n, h, w = setting.images
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "teacher.pth")
        teacher = build_random(read_config(setting.teacher, torch.device("cpu")), seed=1)
        torch.save({"model": teacher.state_dict()}, weights)
        source = "KD.SOURCES.TEACHER"
        overrides = [f"{source}.CONFIG_FILE", setting.teacher, f"{source}.WEIGHTS", weights]
        cfg = read_config(setting.config, device, *overrides, "SOLVER.BASE_LR", 1e-7)
        models = []
        for cfg.KD.ENABLED in (False, True):
            models.append(build_random(cfg))
        inputs = make_batch(n, h, w, cfg.MODEL.RETINANET.NUM_CLASSES)
        plain, kd = (Learner(model, setting.optimizer(cfg, model), inputs) for model in models)
        kd.step()  # the first one reads the teacher's file
    return plain, kd


def teacher_forward(distiller: Distiller, inputs: list[dict[str, Any]]) -> Callable[[], object]:
    """What of a distilled step is the sources' forward, past the hooks of a `Stopwatches`."""
    wiring = distiller.wiring
    device = next(distiller.student.parameters()).device
    context = Context(with_images_on(device, inputs), distiller.input_format, distiller.student)
    asked = wiring.source_taps(wiring.terms)
    return lambda: [wiring.sources[k].forward(context, taps) for k, taps in asked.items()]


if __name__ == "__main__":
    main("step", run, __doc__)
