"""`torch.compile` of the student: taps fire, and values and gradients are those of eager mode."""

import copy
import re
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_det import Distiller, Teacher
from kd_det.diagnostics import Diagnostics
from kd_det.terms import CWD
from tests.steps import gradients, step
from tests.toys import batch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "projects.md").read_text()


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


class Backend:
    """Counts graphs; runs them through autograd's compiler, as every real backend does."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Small(nn.Module):
    """Compiles in a second, where a RetinaNet takes ten."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.backbone, self.head = nn.Sequential(*layers), nn.Conv2d(4, 1, 1)
        self.pixel_mean = None  # it reads Detectron2's batches

    def forward(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        images = torch.stack([x["image"] for x in inputs]).float()
        return {"loss_task": self.head(self.backbone(images)).square().mean()}


@pytest.mark.parametrize("whole", [False, True])
def test_taps_inside_of_what_is_compiled(
    whole: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eager = Distiller(
        student=Small(),
        sources={"teacher": Teacher(model=Small())},
        terms={"inside": CWD(tap="backbone.0"), "end": CWD(tap="backbone")},
        diagnostics=Diagnostics(period=1),
    )
    compiled, backend = copy.deepcopy(eager), Backend()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(compile_module, backend=backend))
    (line,) = re.findall(r"```python\n(model\.student\..*compile\(\))\n```", PAGE)
    exec("model.student.compile()" if whole else line, {"model": compiled})
    for i in range(4):
        for model in (eager, compiled):
            model.zero_grad()
            sum(step(model, i, batch(seed=i)).values()).backward()
        torch.testing.assert_close(gradients(compiled), gradients(eager))
    # Hooks that come and go with every step recompile nothing.
    assert backend.graphs == 1
    assert list(compiled.state_dict()) == list(eager.state_dict())
    said = "grad_ratio is not measured in this run: the student is compiled as a whole"
    assert caplog.text.count(said) == whole


def test_a_wrapped_student_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OptimizedModule: .* names '_orig_mod\.\*'.*in place"):
        Distiller(student=torch.compile(Small()), sources={}, terms={})
