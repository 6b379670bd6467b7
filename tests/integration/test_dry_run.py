"""The dry run: the plan that it prints, and the memory that it states."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.engine.dry_run import measure_step
from kd_det.plan import plan_table, row_bytes
from tests.toys import batch, distiller_cfg, save_teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    teacher = save_teacher(tmp_path_factory.mktemp("teacher"), fpn=16)
    torch.manual_seed(0)
    distiller = build_model(distiller_cfg(teacher, fpn=8)).train()
    distiller.on_start = None
    distiller.prepare()
    return distiller


def test_plan_names_every_level_with_its_cost(model):
    lines = plan_table(model, (2, 128, 256)).splitlines()
    row = next(line.split() for line in lines if "features.p4" in line)
    assert row[:9] == "teacher fpn features.p4 features.p4 1/16 8 -> 16 conv1x1".split()
    # 16 channels on an 8 x 16 grid, 2 images, 4 bytes: target's map, connector's output, gradient.
    assert float(row[-1]) == pytest.approx(3 * 4 * 2 * 16 * 8 * 16 / 2**20, rel=1e-3)
    assert sum("cls_logits.p" in line for line in lines) == 5


def test_row_bytes_round_the_grid_up():
    assert row_bytes(3, 8, (1, 9, 17), connected=False) == 2 * 4 * 3 * 2 * 3
    # Nine anchors of three classes, reduced: the target's map, the student's reduced one, gradient.
    assert row_bytes(27, 8, (1, 9, 17), connected=True, compared=3) == 4 * (27 + 3 + 3) * 2 * 3


def test_measuring_leaves_no_gradient_and_counts_the_losses(model):
    losses, _ = measure_step(model, batch())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_kd_fpn", "loss_kd_logits"}
    assert all(p.grad is None for p in model.parameters())


def test_stated_memory_is_within_20_percent_of_the_measured_peak(model, tmp_path):
    inputs = batch(((256, 256), (256, 320)))
    measure_step(model, inputs)  # anchors and other caches are made once
    _, stated = measure_step(model, inputs)
    with (
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
        EventStorage(0),
    ):
        sum(model(inputs).values()).backward()
    model.zero_grad(set_to_none=True)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    # PyTorch's allocator counts on its own: every allocation, those inside of kernels too.
    memory = [e["args"] for e in events if e.get("name") == "[memory]"]
    levels = [m["Total Allocated"] for m in memory]
    start = levels[0] - memory[0]["Bytes"]
    measured = max(levels) - start
    assert stated == pytest.approx(measured, rel=0.2)
