"""Bad input ends in one sentence before any training step: the config and its parts."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils import comm

from tests.toys import save_teacher

T, L, S = "KD.TERMS.FPN", "KD.TERMS.LOGITS", "KD.SOURCES.TEACHER"
CMD, FILE = "The command line: ", "The config 'run.yaml': "


def test_the_run_as_it_is_would_train(run):
    with pytest.raises(AssertionError, match="a training step ran"):
        run.start()


# What is typed, and what the sentence holds: the key, file or term; what was found; what to do.
WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Unknown names.
    "term": (f"{T}.TYPE CWDD", (f"{T}.TYPE", "no term called 'CWDD'", "Did you mean 'CWD'?")),
    "source": (f"{S}.TYPE Techer", (f"{S}.TYPE", "'Techer'", "Did you mean 'Teacher'")),
    "connector": (f"{T}.CONNECTOR Cnv", (f"{T}.CONNECTOR.TYPE", "'Cnv'", "mean 'Conv'?")),
    "region": (f"{T}.REGION Pading", (f"{T}.REGION.TYPE", "'Pading'", "mean 'Padding'?")),
    "schedule": (f"{T}.SCHEDULE Cosin", (f"{T}.SCHEDULE.TYPE", "'Cosin'", "mean 'Cosine'?")),
    "tap": (f"{T}.TAP featurs", ("Term 'fpn'", "no tap or module 'featurs'", "'features'?")),
    "tap path": (f"{T}.TAP backbone.fpn_out3", ("Term 'fpn'", "'backbone.fpn_output3'")),
    "source tap": (f"{T}.SOURCE_TAP cls_logit", ("Source 'teacher'", "mean 'cls_logits'?")),
    "tap without maps": (f"{T}.TAP anchor_generator", ("Tap 'anchor_generator'", "backbone, head")),
    "level": (f"{T}.LEVELS [p3,p8]", ("Term 'fpn'", "no level 'p8'", "p3, p4, p5, p6, p7")),
    "term's source": (f"{T}.SOURCE TEACHR", ("Term 'fpn'", "'teachr'", "mean 'teacher'?")),
    "inherited source": ("KD.STUDENT.INIT_FROM TEECHER", ("inherits", "'teecher'", "'teacher'?")),
    "inherited module": (
        "KD.STUDENT.INIT_FROM TEACHER KD.STUDENT.INIT_MODULES [heads]",
        ("INIT_MODULES: 'heads' matches nothing", "backbone, head"),
    ),
    "student": (
        "KD.STUDENT.META_ARCHITECTURE RetinaNett",
        ("KD.STUDENT.META_ARCHITECTURE is 'RetinaNett'", "Did you mean 'RetinaNet'"),
    ),
    # Unknown keys.
    "KD key": ("KD.LOGPERIOD 3", (CMD, "no config key KD.LOGPERIOD", "mean 'LOG_PERIOD'?")),
    "KD node": ("KD.TERM.FPN.TYPE CWD", (CMD, "no config key KD.TERM.", "mean 'TERMS'?")),
    "field": (f"{T}.WIEGHT 3", (CMD, f"no field {T}.WIEGHT", "mean 'WEIGHT'?")),
    "teacher's field": (f"{S}.WEIGTHS x", (CMD, f"no field {S}.WEIGTHS", "mean 'WEIGHTS'?")),
    "nested field": (
        f"{T}.CONNECTOR {{TYPE:_Conv,_KERNL:_3}}",
        (CMD, f"no field {T}.CONNECTOR.KERNL", "mean 'KERNEL'?"),
    ),
    "new term": ("KD.TERMS.NEW.TAP features", (CMD, "no KD.TERMS.NEW", "needs a TYPE: ", "CWD")),
    "dataset's field": ("KD.DATASETS.toy.JSN x", (CMD, "KD.DATASETS.toy.JSN", "mean 'JSON'?")),
    "key outside of KD": (
        "MODEL.RETINANET.NUM_CLASES 3",
        (CMD, "no config key MODEL.RETINANET.NUM_CLASES", "Did you mean 'NUM_CLASSES'"),
    ),
    # Wrong types.
    "bool": ("KD.ENABLED maybe", (CMD, "KD.ENABLED is a bool, but got 'maybe'")),
    "float": (f"{T}.WEIGHT heavy", (CMD, f"{T}.WEIGHT is a float, but got 'heavy'")),
    "int": ("KD.LOG_PERIOD ten", (CMD, "KD.LOG_PERIOD is a int, but got 'ten'")),
    "list": (f"{T}.LEVELS 3", (CMD, f"{T}.LEVELS is a list of str, written [a, b], but got 3")),
    "list for a float": (f"{T}.TAU [1]", (CMD, f"{T}.TAU is a float, but got [1]")),
    "int for a bool": (f"{T}.STANDARDIZE 1", (CMD, f"{T}.STANDARDIZE is a bool, but got 1")),
    "word for a node": ("KD.TERMS CWD", (CMD, "KD.TERMS is a map", "'CWD'")),
    "late option": ("SOLVER.MAX_ITER 3 --dry-run", ("--dry-run stands", "come before them")),
    "odd": (f"{T}.WEIGHT", ("The command line", "odd length", f"{T}.WEIGHT")),
    "type outside of KD": ("SOLVER.MAX_ITER many", ("The command line", "SOLVER.MAX_ITER", "many")),
    # Values out of range.
    "tau 0": (f"{T}.TAU 0", (T, "tau > 0, but got 0.0")),
    "tau negative": (f"{T}.TAU -2", (T, "tau > 0, but got -2.0")),
    "tau nan": (f"{T}.TAU .nan", (T, "tau > 0, but got nan")),
    "tau inf": (f"{T}.TAU .inf", (T, "tau", "but got inf")),
    "weight negative": (f"{T}.WEIGHT -1", (T, "finite weight >= 0, but got -1.0")),
    "weight nan": (f"{L}.WEIGHT .nan", (L, "finite weight >= 0, but got nan")),
    "weight inf": (f"{L}.WEIGHT 1e400", (L, "finite weight >= 0, but got inf")),
    "level weight": (f"{T}.LEVEL_WEIGHTS [1,1,1,1,-1]", (T, "level_weights", "-1.0")),
    "level weights": (f"{T}.LEVEL_WEIGHTS [1,2]", ("Term 'fpn'", "2 LEVEL_WEIGHTS for 5 levels")),
    "channel weight": (f"{T}.CHANNEL_WEIGHT max", (T, "none, teacher_max_prob", "'max'")),
    "kernel": (f"{T}.CONNECTOR {{TYPE:_Conv,_KERNEL:_2}}", (T, "odd kernel >= 1, but got 2")),
    "stop before start": (
        f"{T}.SCHEDULE {{TYPE:_Constant,_START_ITER:_10,_STOP_ITER:_5}}",
        (T, "start_iter < stop_iter", "start_iter 10 and stop_iter 5"),
    ),
    "negative start": (f"{T}.SCHEDULE.START_ITER -1", (T, "start_iter -1")),
    "no warmup": (f"{T}.SCHEDULE {{TYPE:_Warmup,_WARMUP_ITERS:_0}}", (T, ">= 1, but got 0")),
    "no steps": (f"{T}.SCHEDULE Step", (T, "Step needs ascending steps", "got steps ()")),
    "steps": (f"{T}.SCHEDULE {{TYPE:_Step,_STEPS:_[5,_3]}}", (T, "ascending", "steps (5, 3)")),
    "ramp": (f"{T}.SCHEDULE {{TYPE:_Ramp,_RATE:_0}}", (T, "but got rate 0.0 and begin 0.0")),
    "cosine": (f"{T}.SCHEDULE {{TYPE:_Cosine,_END:_-1}}", (T, "end >= 0, but got -1.0")),
    "log period": ("KD.LOG_PERIOD 0", ("log_period >= 1, but got 0",)),
    "precision": (f"{S}.PRECISION fp16", (S, "float32, float16, bfloat16, but got 'fp16'")),
    "input format": (f"{S}.INPUT_FORMAT rgb", (S, "input_format is BGR or RGB, but got 'rgb'")),
    "hash": (f"{S}.SHA256 12ab", (S, "8 to 64 hexadecimal digits", "'12ab'")),
    "min ap": (f"{S}.MIN_AP 200", (S, "between 0 and 100", "200.0")),
    # Parts that do not fit.
    "no source": (f"{S}.ENABLED False", ("Term 'fpn'", "no SOURCE", "0 of them (none)")),
    "two sources": (
        "KD.SOURCES.B.TYPE Teacher KD.SOURCES.B.CONFIG_FILE teacher/teacher.yaml",
        ("Term 'fpn'", "no SOURCE", "2 of them (teacher, b)", "say which one"),
    ),
    "one name twice": ("KD.TERMS.fpn.TYPE CWD", ("KD.TERMS has two items called 'fpn'",)),
    "a dict's method": ("KD.TERMS.values.TYPE CWD", ("'values' cannot name", "identifier")),
    "no identifier": ("KD.TERMS.A-B.TYPE CWD", ("'a-b' cannot name", "identifier")),
    "no stride in common": (
        f"{T}.TAP backbone.bottom_up.stem {T}.SOURCE_TAP features",
        ("Term 'fpn'", "stride 4", "p3 (stride 8)", "choose another TAP or SOURCE_TAP"),
    ),
    "channels": (f"{T}.CONNECTOR Identity", ("Term 'fpn'", "level p3", "8 channels", "16", "Auto")),
    "anchors": (
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS [[0.5,1.0]] KD.TERMS.LOGITS.TAP box_deltas",
        ("Term 'logits'", "level p3", "8 channels and the target 4", "same anchors per cell"),
    ),
    "anchor reduction": (f"{T}.ANCHORS mean", (T, "one of max, logsumexp, but got 'mean'")),
    "no class in common": (
        f"{S}.CLASSES ['x','y','z']",
        ("Term 'logits'", "no class in common", "ape, bee, cow, the target's x, y, z", "CLASSES"),
    ),
    "other classes": (
        f"{S}.CLASSES ['x','y']",
        ("Source 'teacher'", "2 CLASSES are named (x, y), but the detector has 3"),
    ),
    "other meta-architecture": (
        "MODEL.META_ARCHITECTURE RetinaNet",
        ("KD.ENABLED is True", "MODEL.META_ARCHITECTURE is 'RetinaNet'", "to 'Distiller'"),
    ),
    "no student": (
        "KD.STUDENT.META_ARCHITECTURE ''",
        ("KD.STUDENT.META_ARCHITECTURE must name", "it is ''"),
    ),
    "itself as student": (
        "KD.STUDENT.META_ARCHITECTURE Distiller",
        ("KD.STUDENT.META_ARCHITECTURE must name", "it is 'Distiller'"),
    ),
    "inherits nothing": (
        "KD.STUDENT.INIT_FROM TEACHER KD.STUDENT.INIT_MODULES [backbone.fpn_lateral3]",
        ("inherits nothing from 'teacher'", "backbone.fpn_lateral3", "INIT_MODULES"),
    ),
    "class count": (
        "MODEL.RETINANET.NUM_CLASSES 80",
        ("MODEL.RETINANET.NUM_CLASSES is 80", "3 class(es) (ape, bee, cow)", "set it to 3"),
    ),
    "unregistered dataset": (
        "DATASETS.TRAIN ('coco_toy',)",
        ("'coco_toy' is not registered", "KD.DATASETS.coco_toy"),
    ),
    "no dataset": ("DATASETS.TRAIN ()", ("DATASETS.TRAIN is empty", "name what to train on")),
    # Files that are not there, or another kind of file.
    "no student's weights": ("MODEL.WEIGHTS gone.pth", ("MODEL.WEIGHTS is 'gone.pth'", "no such")),
    "student's weights": ("MODEL.WEIGHTS toy.json", ("MODEL.WEIGHTS is 'toy.json'", "pickle")),
    "no teacher": (
        f"{S}.CONFIG_FILE '' {S}.WEIGHTS ''",
        (S, "needs CONFIG_FILE", "config_file ''"),
    ),
    "no teacher's config": (
        f"{S}.CONFIG_FILE ''",
        ("no CONFIG_FILE", "these weights carry no config", "student.yaml"),
    ),
    "teacher's config": (f"{S}.CONFIG_FILE gone.yaml", ("no config file 'gone.yaml'", "Looked")),
    "JSON as config": (
        f"{S}.CONFIG_FILE toy.json",
        ("toy.json' cannot be read as a Det", "images"),
    ),
    "image as config": (
        f"{S}.CONFIG_FILE images/a.png",
        ("a.png' cannot be read as a Detectron2",),
    ),
    "no weights": (f"{S}.WEIGHTS ''", ("teacher/teacher.yaml has no weights: set WEIGHTS",)),
    "weights gone": (f"{S}.WEIGHTS gone.pth", ("no weights file 'gone.pth'", "relative to")),
    "text as weights": (f"{S}.WEIGHTS run.yaml", ("run.yaml'", "cannot be read as a checkpoint")),
    "image as weights": (f"{S}.WEIGHTS images/a.png", ("a.png'", "neither PyTorch's nor a pickle")),
    "folder as weights": (f"{S}.WEIGHTS images", ("no weights file", "images'")),
    "another file": (
        f"{S}.SHA256 0123456789",
        ("teacher.pth' has the SHA-256", "0123456789 is exp"),
    ),
    "json": ("KD.DATASETS.toy.JSON gone.json", ("of dataset 'toy' is missing", "gone.json")),
    "images": ("KD.DATASETS.toy.IMAGES gone", ("image folder of dataset 'toy' is missing: gone",)),
    "no JSON": ("KD.DATASETS.toy.JSON run.yaml", ("dataset 'toy'", "run.yaml", "is not JSON")),
    # Settings that Detectron2 asserts, some of them in the first step.
    "no iterations": ("SOLVER.MAX_ITER 0", ("SOLVER.MAX_ITER is 0", "at least 1")),
    "no images": ("SOLVER.IMS_PER_BATCH 0", ("SOLVER.IMS_PER_BATCH is 0", "at least 1")),
    "no checkpoints": ("SOLVER.CHECKPOINT_PERIOD 0", ("CHECKPOINT_PERIOD is 0", "at least 1")),
    "AMP on the CPU": (
        "SOLVER.AMP.ENABLED True",
        ("SOLVER.AMP.ENABLED is True", "set it to False"),
    ),
    # The output folder.
    "no output": ("OUTPUT_DIR ''", ("OUTPUT_DIR is empty", "name the folder")),
    "file as output": ("OUTPUT_DIR toy.json", ("OUTPUT_DIR is 'toy.json'", "cannot be written")),
    "under a file": ("OUTPUT_DIR toy.json/run", ("toy.json/run'", "cannot be written (Not a dir")),
}


@pytest.mark.parametrize("case", WORDS)
def test_the_command_line(run, case):
    words, says = WORDS[case]
    # A word's quotes are those of the shell, an underscore after : or , is a space.
    split = [w.strip("'").replace(":_", ": ").replace(",_", ", ") for w in words.split()]
    run.refused(*split, says=says)


def test_images_that_the_processes_cannot_share(run, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    says = ("SOLVER.IMS_PER_BATCH is 3", "2 processes cannot share", "a multiple of 2")
    run.refused("SOLVER.IMS_PER_BATCH", "3", says=says)


def test_there_are_enough_cases():
    assert len(WORDS) >= 60


def terms(**change):
    return lambda cfg: cfg["KD"].update(TERMS=change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (terms(), ("KD.ENABLED is True, but KD.TERMS is empty", "Add a term")),
        (lambda c: c["KD"].update(TERMS=None), (FILE, "KD.TERMS is a map", "None")),
        (lambda c: c["KD"].update(TERMS=["CWD"]), (FILE, "KD.TERMS is a map", "['CWD']")),
        (lambda c: c["KD"].update(SOURCES={}), ("Term 'fpn' names no SOURCE", "0 of them")),
        (terms(A={"TYPE": 3}), (FILE, "KD.TERMS.A.TYPE", "no term called '3'")),
        (terms(A={"TYPE": "CWD", "WEIGHT": None}), (FILE, "KD.TERMS.A.WEIGHT", "None")),
        (terms(A={"TYPE": "CWD", "TAP": ["p3"]}), (FILE, "KD.TERMS.A.TAP is a str", "['p3']")),
        (terms(A={"TAP": "features"}), (FILE, "no KD.TERMS.A", "needs a TYPE")),
        (lambda c: c["MODEL"].update(RETINANETT=1), (FILE, "MODEL.RETINANETT", "'RETINANET'?")),
        (lambda c: c.update(_BASE_="gone.yaml"), ("run.yaml", "gone.yaml")),
        (lambda c: c["SOLVER"].update(MAX_ITER="x"), ("run.yaml", "SOLVER.MAX_ITER", "str")),
    ],
)
def test_the_config_file(run, change, says):
    run.edit(change)
    run.refused(says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.yaml", ("no config file 'gone.yaml'", "working directory")),
        ("images", ("no config file 'images'",)),
        ("images/a.png", ("The config 'images/a.png' cannot be read",)),
        ("half.yaml", ("The config 'half.yaml' cannot be read", "line 1")),
        ("list.yaml", ("The config 'list.yaml' is no config",)),
        ("empty.yaml", ("The config 'empty.yaml' is no config",)),
    ],
)
def test_what_is_no_config_file(run, name, says):
    run.write("half.yaml", b"MODEL: [")
    run.write("list.yaml", b"- a\n- b\n")
    run.write("empty.yaml", b"")
    run.config = name
    run.refused(says=says)


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ({"arch": "GeneralizedRCNN"}, ("Source 'teacher'", "'cls_logits'", "'rpn_logits'")),
        ({"classes": 5}, ("Term 'logits'", "3 channels and the target 5", "same classes")),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_teacher_that_does_not_fit_the_terms(run, difference, says):
    save_teacher(run.folder / "teacher", **{"fpn": 16, **difference})
    run.refused(says=says)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a read-only file system")
def test_a_read_only_output_folder(run):
    run.refused("OUTPUT_DIR", "/proc/self/run", says=("'/proc/self/run'", "cannot be written"))


def test_a_full_output_folder(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    run.refused(says=("OUTPUT_DIR is", "0.0 MiB are free", "a checkpoint takes about", "make room"))
