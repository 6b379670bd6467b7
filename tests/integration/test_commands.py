"""``python -m kd_det plan``, ``export`` and ``visualise``, on one short distilled run."""

import importlib
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import nn

from kd_det.__main__ import main
from kd_det.data.synthetic import CLASSES
from kd_det.engine import Trainer, load_config
from kd_det.tools import export, visualise
from tests.synthetic import synthetic_run
from tests.toys import toy_cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``data/``, ``teacher/``, and ``run/`` as train_net.py leaves it."""
    folder = tmp_path_factory.mktemp("commands")
    cfg = synthetic_run(folder)
    cfg.OUTPUT_DIR = str(folder / "run")
    cfg.TEST.EVAL_PERIOD = 0
    cfg.DATASETS.TEST = ()
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0  # or so young a student finds nothing
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(cfg.dump())
    seed_all_rng(cfg.SEED)
    Trainer(cfg).train()
    return folder


@pytest.fixture
def image(folder) -> str:
    return str(folder / "data" / "val" / "000000.png")


def stock_student(config: Path) -> nn.Module:
    """As Detectron2 builds it from the exported files."""
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as e:
        main(list(words))
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_plan_prints_and_writes_nothing(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    words = ["--config-file", str(folder / "run" / "config.yaml"), "SOLVER.IMS_PER_BATCH", "3"]
    assert main(["plan", *words, "OUTPUT_DIR", str(folder / "new")]) == 0
    printed = capsys.readouterr().out
    assert "8 -> 16" in printed
    assert "for a batch of 3 images padded to 64 x 64" in printed
    assert "losses of one batch: loss_cls" in printed
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS is 'gone.pth', but there is no such file"),
        (["MODEL.RETINANET.NUM_CLASSES", "5"], "but the datasets have 6 class(es)"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["KD.TERMS.FPN.WEIGTH", "1"], "Did you mean"),
        (["SOLVER.MAX_ITER", "3", "--import", "kd_det"], "options come before them"),
    ],
)
def test_plan_refuses_what_train_net_refuses(folder, capsys, change, says):
    config = str(folder / "run" / "config.yaml")
    assert says in refused(capsys, "plan", "--config-file", config, *change)


def test_export_gives_a_plain_student_and_a_traced_one_that_equals_it(
    folder, image, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["export", "--run", str(folder / "run"), "--output", "student"]
    assert main([*words, "--format", "torchscript", "--image", image]) == 0
    assert "RetinaNet traced on cpu at 64 x 64; for the mirrored image" in capsys.readouterr().out
    trained = torch.load(folder / "run" / "model_final.pth")["model"]
    exported = torch.load("student/model.pth")
    assert list(exported) == ["model"]
    torch.testing.assert_close(dict(exported["model"]), dict(trained), rtol=0, atol=0)
    model = stock_student(Path("student/student.yaml"))
    traced = torch.jit.load("student/model.ts")
    for other in ("000001.png", "000002.png"):
        pixels = export.sample_image(get_cfg(), str(Path(image).with_name(other)), [64, 64])
        with torch.no_grad():
            expected = model([{"image": pixels}])[0]["instances"]
        boxes, classes, scores, size = traced(pixels)
        assert len(expected) > 0
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor)
        torch.testing.assert_close(classes, expected.pred_classes)
        torch.testing.assert_close(scores, expected.scores)
        assert size.tolist() == [64, 64]


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x[1:]])
def test_a_traced_student_that_differs_is_refused(change):
    found = (torch.rand(3, 4), torch.rand(3))
    assert "gives what the student gives: 3 x 4, 3" in export.compared("It", found, found)
    with pytest.raises(ValueError, match="do not use it"):
        export.compared("It", found, (found[0], change(found[1])))


@pytest.mark.parametrize("arch", ["GeneralizedRCNN", "SemanticSegmentor", "PanopticFPN"])
def test_other_detectors_are_traced_or_it_is_said_why_not(arch, tmp_path):
    torch.manual_seed(0)
    cfg = toy_cfg(arch=arch)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg).eval()
    pixels = export.sample_image(cfg, None, [64, 96])
    assert pixels.shape == (3, 64, 96)
    if arch == "PanopticFPN":  # lists its segments, which are no tensors
        with pytest.raises(ValueError, match="This PanopticFPN cannot be traced"):
            export.trace(model, pixels, "torchscript", tmp_path / "model.ts")
    else:
        said = export.trace(model, pixels, "torchscript", tmp_path / "model.ts")
        assert "gives what the student gives" in said


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="onnx and onnxruntime are not installed",
)
def test_export_to_onnx(folder, image, tmp_path, capsys):
    words = ["--output", str(tmp_path), "--format", "onnx", "--image", image]
    assert main(["export", "--run", str(folder / "run"), *words]) == 0
    assert "gives what the student gives" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config-file", "{run}/config.yaml"], "MODEL.WEIGHTS is empty"),
        (["--config-file", "{run}/config.yaml", "MODEL.WEIGHTS", "{teacher}"], "is not a check"),
        (["--run", "{run}/none"], "there is no config.yaml and no student.yaml"),
        (["--run", "{run}", "--format", "onnx"], "needs the package onnx"),
        (["--run", "{run}", "--format", "torchscript", "--size", "0", "64"], "but got 0 64"),
        (["--run", "{run}", "--format", "torchscript", "--image", "no.png"], "no image 'no.png'"),
        (["--import", "no_such_project", "--run", "{run}"], "there is no module 'no_such_project'"),
        (["--import", "kd_det:add_kd", "--run", "{run}"], "no function 'add_kd'. Did you mean"),
        (["--import", "./mine.py", "--run", "{run}"], "there is no module './mine.py'"),
        (["--output", "{run}/config.yaml", "--run", "{run}"], "config.yaml cannot be made"),
    ],
)
def test_export_says_what_is_missing(folder, tmp_path, capsys, monkeypatch, words, says):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name == "onnx" else known(name)
    )
    names = {"run": folder / "run", "teacher": folder / "teacher" / "teacher.pth"}
    words = [word.format(**names) for word in words]
    assert says in refused(capsys, "export", "--output", str(tmp_path / "out"), *words)


def test_an_unfinished_run_gives_its_last_checkpoint(folder, tmp_path, capsys):
    for name in ("config.yaml", "model_0000001.pth"):
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    words = ["export", "--run", str(tmp_path), "--output", str(tmp_path / "out")]
    assert "there is no model_final.pth in this folder" in refused(capsys, *words)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert main(words) == 0
    exported = torch.load(tmp_path / "out" / "model.pth")["model"]
    saved = torch.load(tmp_path / "model_0000001.pth")["model"]
    torch.testing.assert_close(dict(exported), dict(saved), rtol=0, atol=0)


def test_visualise_draws_student_and_teacher(folder, image, tmp_path, capsys):
    wide = tmp_path / "wide.png"
    Image.open(image).resize((100, 60)).save(wide)
    picture = tmp_path / "maps.png"
    words = ["--images", str(wide), image, "--output", str(picture), "--score", "0"]
    assert main(["visualise", "--run", str(folder / "run"), *words]) == 0
    assert "student, teacher" in capsys.readouterr().out
    w, h = Image.open(picture).size
    assert w > 500
    assert h > 300

    weights = str(folder / "run" / "model_final.pth")
    cfg = load_config(str(folder / "run/config.yaml"), ["MODEL.WEIGHTS", weights])
    cfg.DATASETS.TRAIN = ("without_names", *cfg.DATASETS.TRAIN)
    student, teacher = visualise.views(cfg, "features")
    assert list(student.classes) == list(CLASSES)
    inputs = student.mapper({"file_name": str(wide)})
    prediction, pictures = visualise.look(student, str(wide), "features")
    assert prediction["instances"].image_size == (60, 100)
    height, width = inputs["image"].shape[1:]
    assert pictures[8].shape == (math.ceil(height / 8), math.ceil(width / 8))  # without the padding
    with torch.no_grad():
        p3 = student.model.backbone(student.model.preprocess_image([inputs]).tensor)["p3"][0]
    h, w = pictures[8].shape
    torch.testing.assert_close(torch.as_tensor(pictures[8]), p3[:, :h, :w].abs().mean(0))
    file = torch.load(folder / "teacher" / "teacher.pth")["model"]
    torch.testing.assert_close(dict(teacher.model.state_dict()), dict(file), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--images", "gone.png"], "There is no image 'gone.png'"),
        (["--images", "{image}", "--levels", "p9"], "the student has no level 'p9'"),
        (["--images", "{image}", "--tap", "featurs"], "Did you mean"),
        (["--images", "{run}/config.yaml"], "cannot be read as an image"),
        (["--output", "{run}", "--images", "{image}"], "is a folder: name a file in it"),
    ],
)
def test_visualise_says_what_is_missing(folder, image, tmp_path, capsys, words, says):
    words = [word.format(image=image, run=folder / "run") for word in words]
    words += ["--run", str(folder / "run")]
    assert says in refused(capsys, "visualise", "--output", str(tmp_path / "x.png"), *words)


def test_a_script_has_nothing_to_draw(folder, image, tmp_path, capsys):
    script = "{SCRIPT: {TYPE: ScriptedTeacher, WEIGHTS: net.pt}, TEACHER: {ENABLED: False}}"
    config = tmp_path / "scripted.yaml"
    config.write_text(f"_BASE_: {folder}/run/config.yaml\nKD: {{SOURCES: {script}}}")
    words = ["--config-file", str(config), "--images", image, "--output", str(tmp_path / "x.png")]
    words += ["MODEL.WEIGHTS", str(folder / "run" / "model_final.pth")]
    assert "out with KD.SOURCES.SCRIPT.ENABLED False" in refused(capsys, "visualise", *words)
    assert main(["visualise", *words, "KD.SOURCES.SCRIPT.ENABLED", "False"]) == 0


def test_a_lazyconfig_is_no_config_of_a_command(tmp_path, capsys):
    for name, text in (("lazy.py", "model = None"), ("saved.yaml", "dataloader: 1\nmodel: 2\n")):
        (tmp_path / name).write_text(text)
        said = refused(capsys, "plan", "--config-file", str(tmp_path / name))
        assert f"{name}': it is a LazyConfig" in said


PROJECT = """
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

@META_ARCH_REGISTRY.register()
class CommandsNet(RetinaNet):
    @classmethod
    def from_config(cls, cfg):
        assert cfg.MODEL.COMMANDS.DEPTH == 3
        return super().from_config(cfg)

def add_commands_config(cfg):
    cfg.MODEL.COMMANDS = type(cfg)({"DEPTH": 1})
"""
DISTILLED = """
_BASE_: "net.yaml"
MODEL: {META_ARCHITECTURE: "Distiller"}
KD:
  ENABLED: True
  STUDENT: {META_ARCHITECTURE: "CommandsNet"}
  SOURCES: {TEACHER: {TYPE: "Teacher", CONFIG_FILE: "net.yaml", WEIGHTS: "net.pth"}}
"""


def test_a_project_is_imported_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "commands_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = toy_cfg()
    cfg.MODEL.META_ARCHITECTURE = "CommandsNet"
    cfg.MODEL.COMMANDS = CfgNode({"DEPTH": 3})
    weights = str(tmp_path / "net.pth")
    cfg.MODEL.WEIGHTS = weights
    (tmp_path / "net.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "net.yaml")]
    assert "there is no config key MODEL.COMMANDS" in refused(
        capsys, "export", *words, "--output", "out"
    )
    words += ["--import", "commands_project:add_commands_config"]
    try:
        assert main(["taps", *words]) == 0
        assert "cls_logits" in capsys.readouterr().out
        plain = toy_cfg()
        torch.save({"model": build_model(plain).state_dict()}, weights)
        assert main(["export", *words, "--output", str(tmp_path / "out")]) == 0
        assert "META_ARCHITECTURE: CommandsNet" in (tmp_path / "out/student.yaml").read_text()
        distilled = tmp_path / "distilled.yaml"
        distilled.write_text(DISTILLED)
        add = [importlib.import_module("commands_project").add_commands_config]
        found = visualise.views(load_config(str(distilled), [], add), "features")
        assert [type(view.model).__name__ for view in found] == ["CommandsNet"] * 2
    finally:
        META_ARCH_REGISTRY._obj_map.pop("CommandsNet", None)
