"""`torch.compile` of the student: taps fire, and values and gradients are those of eager mode."""

import copy

import pytest
import torch
from torch import nn

from kd_det import Distiller, Teacher
from kd_det.diagnostics import Diagnostics
from kd_det.terms import CWD
from tests.steps import gradients, step
from tests.toys import batch


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
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss_task": self.head(self.body(images.float())).square().mean()}


class OnImages(nn.Module):
    """A meta-architecture around it."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel_mean, self.net = None, Small()

    def forward(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        return self.net(torch.stack([x["image"] for x in inputs]))


@pytest.mark.parametrize("part", ["net.body", ""], ids=["backbone", "whole"])
def test_taps_inside_of_what_is_compiled(part: str, caplog: pytest.LogCaptureFixture) -> None:
    eager = Distiller(
        student=OnImages(),
        sources={"teacher": Teacher(model=OnImages())},
        terms={"inside": CWD(tap="net.body.0"), "end": CWD(tap="net.body")},
        diagnostics=Diagnostics(period=1),
    )
    compiled, backend = copy.deepcopy(eager), Backend()
    compiled.student.get_submodule(part).compile(backend=backend)
    for i in range(4):
        for model in (eager, compiled):
            model.zero_grad()
            sum(step(model, i, batch(seed=i)).values()).backward()
        torch.testing.assert_close(gradients(compiled), gradients(eager))
    # Hooks that come and go with every step recompile nothing.
    assert backend.graphs == 1
    assert list(compiled.state_dict()) == list(eager.state_dict())
    whole = "grad_ratio is not measured in this run: the student is compiled as a whole"
    assert caplog.text.count(whole) == (not part)


def test_a_wrapped_student_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OptimizedModule: .* names '_orig_mod\.\*'.*in place"):
        Distiller(student=torch.compile(Small()), sources={}, terms={})
