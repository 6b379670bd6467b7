"""Bad input ends in one sentence before any training step: files of weights and of data."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer

import train_net
from kd_det.engine import Trainer
from tests.runs import ToyRun
from tests.toys import save_teacher

S = "KD.SOURCES.TEACHER"
TEACHER = "teacher/teacher.pth"


# -- weights --------------------------------------------------------------------------------------


def damaged(data: bytes, how: str) -> bytes:
    half = len(data) // 2
    return {
        "truncated": data[:half],
        "empty": b"",
        "text": b"weights",
        # More than the padding between two records.
        "flipped": data[:half] + bytes(x ^ 4 for x in data[half:][:200]) + data[half + 200 :],
    }[how]


DAMAGES = {
    "truncated": "it is damaged or cut off",
    "empty": "(0 bytes) cannot be read as a checkpoint of a model (it is empty)",
    "text": "it is neither PyTorch's nor a pickle",
    "flipped": "does not match its checksum",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_teacher(run, how):
    run.write(TEACHER, damaged((run.folder / TEACHER).read_bytes(), how))
    run.refused(says=("The teacher of", f"/{TEACHER}'", DAMAGES[how]))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_weights_of_the_student(run, how):
    run.write("init.pth", damaged((run.folder / TEACHER).read_bytes(), how))
    words = DAMAGES[how].removeprefix("(0 bytes) cannot be read as a checkpoint of a model ")
    run.refused("MODEL.WEIGHTS", "init.pth", says=("MODEL.WEIGHTS is 'init.pth'", words))


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ({"arch": "GeneralizedRCNN"}, ("Missing: backbone.top_block", "In the file only: prop")),
        ({"classes": 5}, ("head.cls_score.weight ((5, 16, 3, 3) in the file, (3, 16, 3, 3) in",)),
        ({"fpn": 8}, ("Of another shape: backbone.fpn_lateral3.weight",)),
        ({"sizes": 2}, ("head.cls_score.weight ((6, 16, 3, 3) in the file",)),
        ({"width": 8}, ("entries come from the file (7 %)",)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_weights_of_another_teacher(run, difference, says):
    _, weights = save_teacher(run.folder / "other", **{"fpn": 16, **difference})
    advice = "Check CONFIG_FILE and WEIGHTS"
    run.refused(f"{S}.WEIGHTS", weights, says=("is not a checkpoint of this", *says, advice))


def test_weights_of_a_shallower_teacher(run):
    config = run.folder / "teacher" / "teacher.yaml"
    content = yaml.safe_load(config.read_text())
    content["MODEL"]["RESNETS"]["DEPTH"] = 101
    config.write_text(yaml.safe_dump(content))
    run.refused(says=("284 of 539 entries", "Missing: backbone.bottom_up.res4.6.conv1.weight"))


def change_teacher(run: ToyRun, change: Any) -> None:
    content = torch.load(run.folder / TEACHER)
    change(content["model"])
    torch.save(content, run.folder / TEACHER)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["head.cls_score.bias"].fill_(math.nan), "head.cls_score.bias is not finite"),
        (
            lambda m: m["backbone.bottom_up.stem.conv1.norm.running_var"].fill_(-1.0),
            "backbone.bottom_up.stem.conv1.norm.running_var is negative",
        ),
        (
            lambda m: m.update({"head.cls_score.bias": torch.zeros(3, dtype=torch.int64)}),
            "head.cls_score.bias is of torch.int64",
        ),
        (lambda m: m.pop("head.cls_score.bias"), "Missing: head.cls_score.bias"),
        (lambda m: m.update(ema=torch.zeros(1)), "In the file only: ema"),
        (lambda m: m.clear(), "0 of 284 entries"),
        (lambda m: m.update(optimizer={"lr": 1}), "'optimizer' is a dict, not a tensor"),
    ],
    ids=["nan", "variance", "integers", "missing", "extra", "nothing", "optimizer"],
)
def test_a_teacher_whose_weights_cannot_be_right(run, change, says):
    change_teacher(run, change)
    run.refused(says=(TEACHER, says))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MODEL: [", "line 1"),
        ("- a", "teacher.yaml' cannot be read as a Detectron2 config"),
        ("NO_SUCH_KEY: 1", "NO_SUCH_KEY"),
        ("MODEL: {RETINANET: {NUM_CLASES: 1}}", "MODEL.RETINANET.NUM_CLASES"),
        ("", "teacher.yaml' cannot be read as a Detectron2 config"),
        ("MODEL: {META_ARCHITECTURE: RetinaNett}", "RetinaNett"),
    ],
)
def test_a_teachers_config(run, text, says):
    run.write("teacher/teacher.yaml", text.encode())
    run.refused(says=("eacher", says))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model =", "SyntaxError"),
        ("model = 3", "it has no `model`"),
        ("import no_such_module", "no_such_module"),
    ],
)
def test_a_teachers_lazy_config(run, text, says):
    run.write("teacher/lazy.py", text.encode())
    run.refused(f"{S}.CONFIG_FILE", "teacher/lazy.py", says=("teacher/lazy.py' cannot be", says))


# -- data -----------------------------------------------------------------------------------------


def first(key: str, **new: Any) -> Any:
    return lambda content: content[key][0].update(new)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories' (found: annotations, images)"),
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c.update(annotations={}), "has no list 'annotations'"),
        (lambda c: c.update(categories=[]), "the list 'categories' has no entries"),
        (lambda c: c.update(images=[]), "the list 'images' has no entries"),
        (lambda c: c.update(annotations=[]), "the list 'annotations' has no entries"),
        (lambda c: c.update(images=[3]), "entry 0 of 'images' lacks file_name"),
        (lambda c: c["images"][0].pop("width"), "entry 0 of 'images' lacks width"),
        (first("images", id=1), "two entries of 'images' have the id 1"),
        (first("images", id=[1]), "entry 0 of 'images' has the id [1]; it must be a int or str"),
        (first("images", height="64"), "the height '64'; it must be a int or float"),
        (first("images", file_name=3), "the file_name 3; it must be a str"),
        (first("images", file_name="c.png"), "1 of 2 images are not in"),
        (first("categories", id="1"), "entry 0 of 'categories' has the id '1'"),
        (first("categories", name=None), "the name None; it must be a str"),
        (first("categories", name="bee"), "two categories are called 'bee'"),
        (first("annotations", category_id=9), "annotation 1 has category 9"),
        (first("annotations", category_id=[9]), "the category_id [9]; it must be a int"),
        (first("annotations", image_id=9), "annotation 1 belongs to image 9"),
        (first("annotations", bbox=[1, 2, 3]), "the box of annotation 1 is [1, 2, 3]"),
        (first("annotations", bbox=None), "the box of annotation 1 is None"),
        (first("annotations", bbox=[1, 2, math.nan, 4]), "four finite numbers"),
        (first("annotations", bbox=[1, 2, -3, 4]), "1 of 2 boxes have a negative width"),
        (first("annotations", bbox=[1, 2, 0, 4]), "1 of 2 boxes have zero width"),
        (first("annotations", bbox=[8, 8, 90, 9]), "1 of 2 boxes lie more than 1 px outside"),
    ],
)
def test_annotations(run, change, says):
    run.annotate(change)
    run.refused(says=("dataset 'toy'", says))


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe\x00", b'{"images": [{"id"'])
def test_annotations_that_are_no_json(run, content):
    run.write("toy.json", content)
    run.refused(says=("dataset 'toy'", "toy.json, is not JSON"))


# -- a folder to resume ---------------------------------------------------------------------------


def saved(run: ToyRun, *, read: bool = False) -> Path:
    """A checkpoint in the run's folder, as after 4 iterations; the teacher may have been read."""
    trainer = Trainer(train_net.setup(run.arguments()))
    if read:
        trainer.model.prepare()
    trainer.iter = 4
    trainer.checkpointer.save("model_0000004", iteration=4)
    return run.out / "model_0000004.pth"


@pytest.mark.parametrize("words", [(), ("MODEL.WEIGHTS", "gone.pth")])  # which nobody reads again
def test_a_good_folder_would_resume(run, words):
    saved(run)
    with pytest.raises(AssertionError, match="a training step ran"):
        run.start(*words, resume=True)
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS is 'gone\.pth'"):
        run.start("MODEL.WEIGHTS", "gone.pth")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_last_checkpoint(run, how):
    path = saved(run)
    path.write_bytes(damaged(path.read_bytes(), how))
    words = DAMAGES[how].partition("(")[2].rstrip(")") or DAMAGES[how]
    run.refused(resume=True, says=("The last checkpoint", path.name, words.split("(")[-1]))


def test_a_last_checkpoint_that_is_gone(run):
    saved(run).unlink()
    run.refused(resume=True, says=("The last checkpoint", "model_0000004.pth' cannot be read"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("MODEL.FPN.OUT_CHANNELS", "4"), "The folder holds the checkpoint of another run"),
        (("KD.ENABLED", "False"), "was written with distillation, this run is without"),
        (("KD.TERMS.LOGITS.ENABLED", "False"), "with terms fpn, logits (this run has fpn)"),
        (("KD.TERMS.FPN.WEIGHT", "0"), "with terms fpn, logits (this run has logits)"),
        (("KD.TERMS.NEW.TYPE", "CWD"), "with terms fpn, logits (this run has fpn, logits, new)"),
        (("KD.TERMS.FPN.CONNECTOR", "{TYPE: Conv, KERNEL: 3}"), "source, learner or shape of term"),
        (("KD.TERMS.LOGITS.TAP", "box_deltas"), "another tap, level, connector"),
    ],
    ids=["model", "disabled", "term", "weight 0", "new term", "connector", "tap"],
)
def test_the_folder_of_another_run(run, words, says):
    saved(run)
    run.refused(*words, resume=True, says=(says,))


def test_another_teacher_in_a_run_that_goes_on(run):
    saved(run, read=True)
    save_teacher(run.folder / "teacher", fpn=16, seed=9)
    run.refused(resume=True, says=("Source 'teacher' is not the one", "Restore the file"))


def test_a_folder_of_another_tool(run):
    run.out.mkdir()
    DetectionCheckpointer(torch.nn.Linear(2, 2), str(run.out)).save("model_0000004")
    run.refused(resume=True, says=("checkpoint of another run", "model_0000004.pth"))
