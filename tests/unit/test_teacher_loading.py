"""The frozen teacher: strict loading, fingerprints, arguments."""

import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from kd_det.sources import Teacher
from kd_det.sources.strict import load_strictly
from kd_det.sources.weights_file import file_fingerprint
from tests import toys
from tests.teachers import TAPS, altered, assert_same, build, context, started, stock_maps

# -- strict loading -------------------------------------------------------------------------------


def test_everything_comes_from_the_file(files):
    source = started(files, fold_batch_norm=False)
    theirs = torch.load(files[1])["model"]
    assert all(torch.equal(v, theirs[k]) for k, v in source.hidden.held.state_dict().items())


def drop(key):
    return lambda state: state.pop(key)


def rename(key, new):
    return lambda state: state.update({new: state.pop(key)})


def put(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("head.cls_score.bias"), r"Missing: head.cls_score.bias\."),
        (drop("backbone.bottom_up.stem.conv1.norm.running_var"), "Missing: .*running_var"),
        (
            rename("head.cls_score.bias", "head.cls_scores.bias"),
            "Missing: head.cls_score.bias. Did you mean 'head.cls_scores.bias'.*In the file only",
        ),
        (
            put("head.cls_score.bias", torch.zeros(7)),
            r"Of another shape: head.cls_score.bias \(\(7,\) in the file, \(3,\) in the model\)",
        ),
        (put("ema.decay", torch.zeros(1)), r"In the file only: ema.decay\."),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("head")], r"\(9\d %\).*and \d+ more"),
        (lambda s: s.clear(), r"0 of \d+ entries come from the file \(0 %\)"),
    ],
    ids=["missing", "statistics", "renamed", "shape", "extra", "no head", "empty"],
)
def test_less_or_more_than_all_of_it_is_an_error(files, tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as e:
        started(altered(files, tmp_path, change))
    assert "Check CONFIG_FILE and WEIGHTS" in str(e.value)
    assert files[0] in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: [s.pop(k) for k in list(s) if k.endswith("num_batches_tracked")],
        put("anchor_generator.cell_anchors.0", torch.zeros(1, 4)),
        put("pixel_mean", torch.zeros(3, 1, 1)),
        put("pixel_std", torch.zeros(3, 1, 1)),
    ],
    ids=["num_batches_tracked", "cell_anchors", "pixel_mean", "pixel_std"],
)
def test_what_carries_no_training_may_differ(files, tmp_path, change):
    maps = started(altered(files, tmp_path, change))(context(), TAPS).maps
    expected, _ = stock_maps(files)  # the file's pixel statistics are not taken over either
    assert_same(maps["features"]["p3"], expected["p3"])


@pytest.mark.parametrize("difference", [{"classes": 5}, {"sizes": 2}, {"fpn": 8}])
def test_the_weights_of_another_teacher_are_an_error(files, tmp_path, difference):
    other, _ = toys.save_teacher(tmp_path, **{"fpn": 16, **difference})
    with pytest.raises(ValueError, match="Of another shape"):
        started((other, files[1]))


def test_a_backbones_weights_are_no_teacher(files, tmp_path):
    def only_backbone(state):
        for key in [k for k in state if not k.startswith("backbone.bottom_up")]:
            del state[key]

    with pytest.raises(ValueError, match="not a checkpoint of this architecture"):
        started(altered(files, tmp_path, only_backbone))


def test_shallower_weights_are_no_deeper_teacher(files, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(files[0])
    cfg.MODEL.RESNETS.DEPTH = 101
    deeper = tmp_path / "deeper.yaml"
    deeper.write_text(cfg.dump())
    with pytest.raises(ValueError, match=r"Missing: backbone.bottom_up.res4"):
        started((str(deeper), files[1]))


def test_a_matching_heuristic_is_not_enough_either(files, tmp_path):
    # The zoo's .pkl files are matched by similar names; what is not matched stays random.
    state = {k: v.numpy() for k, v in torch.load(files[1])["model"].items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "x", "matching_heuristics": True}))
    assert started((files[0], str(path)))(context(), TAPS).maps
    del state["head.cls_score.bias"]
    path.write_bytes(pickle.dumps({"model": state, "__author__": "x", "matching_heuristics": True}))
    with pytest.raises(ValueError, match=r"Missing: head.cls_score.bias"):
        started((files[0], str(path)))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "list", "yaml"])
def test_a_file_that_is_no_checkpoint_is_named(files, tmp_path, damage):
    path = tmp_path / "teacher.pth"
    with open(files[1], "rb") as f:
        whole = f.read()
    if damage == "list":
        torch.save([1, 2, 3], path)
    else:
        path.write_bytes(
            {
                "truncated": whole[: len(whole) // 2],
                "text": b"hello",
                "empty": b"",
                "yaml": b"a: 1",
            }[damage]
        )
    with pytest.raises(ValueError, match=r"teacher.pth' \(\d+ bytes\) cannot be read as a check"):
        started((files[0], str(path)))


def test_a_checkpoint_without_the_outer_dict_is_read(files, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(torch.load(files[1])["model"], path)
    assert started((files[0], str(path)))(context(), TAPS).maps


def test_weights_come_from_the_config_when_none_are_given(files, tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(files[0])
    cfg.MODEL.WEIGHTS = files[1]
    config = tmp_path / "teacher.yaml"
    config.write_text(cfg.dump())
    assert started((str(config), ""))(context(), TAPS).maps


def test_no_weights_at_all_are_an_error(files):
    with pytest.raises(ValueError, match="has no weights: set WEIGHTS"):
        started((files[0], ""))


def test_the_fingerprint_is_that_of_the_weights(files, tmp_path):
    source = started(files)
    assert source.fingerprint() == file_fingerprint(files[1])
    assert Teacher(config_file=files[0], weights=files[1]).fingerprint() == ""  # not read yet
    other = started(altered(files, tmp_path, lambda s: s["head.cls_score.bias"].add_(1)))
    assert other.fingerprint() != source.fingerprint()
    loaded = [Teacher(model=build(files)) for _ in range(2)]
    for teacher in loaded:
        teacher.prepare(TAPS)
    assert loaded[0].fingerprint() == loaded[1].fingerprint() != ""
    with torch.no_grad():
        loaded[1]._origin.model.head.cls_score.bias.add_(1)
    loaded[1].release()
    loaded[1].prepare(TAPS)
    assert loaded[0].fingerprint() != loaded[1].fingerprint()


def test_strict_loading_returns_the_fingerprint_and_fills_in_place(files):
    model = build(files)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert load_strictly(model, files[1], what="It") == file_fingerprint(files[1])
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("weight"))


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs CONFIG_FILE"),
        ({"config_file": "x.yaml", "model": nn.Identity()}, "not both; got config_file 'x.yaml'"),
        ({"config_file": "x", "precision": "fp16"}, "one of float32, float16, bfloat16"),
        ({"config_file": "x", "input_format": "rgb"}, "BGR or RGB, but got 'rgb'"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        Teacher(**arguments)


@pytest.mark.parametrize("text", ["MODEL: [", "NO_SUCH_KEY: 1", "MODEL: {RETINANET: {X: 1}}"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    config = tmp_path / "broken.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=r"broken.yaml' cannot be read as a Detectron2 config"):
        Teacher(config_file=str(config)).shapes(TAPS)


def test_an_unknown_tap_of_the_teacher_is_an_error(files):
    with pytest.raises(KeyError, match="Presets"):
        Teacher(config_file=files[0]).shapes(("featurs",))


def test_a_given_model_is_left_as_it_is():
    model = build_model(toys.toy_cfg()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = Teacher(model=model)
    teacher.shapes(("features",))
    teacher.prepare(("features",))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not teacher.hidden.held.training
