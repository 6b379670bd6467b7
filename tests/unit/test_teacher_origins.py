"""Teachers by zoo name, and by a checkpoint that carries its config."""

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import yaml
from detectron2.config import LazyCall, LazyConfig
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.file_io import PathHandler, PathManager
from omegaconf import OmegaConf

import kd_det
from kd_det.config import student_config
from kd_det.paths import CONFIGS, zoo_checkpoint
from kd_det.sources import SourceUnavailable, Teacher
from tests import configs, toys
from tests.teachers import TAPS, assert_same, context, stock_maps

R101 = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
ZOO = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/"


def imitates(source, files):
    source.prepare(TAPS)
    features, _ = stock_maps(files)
    assert_same(source(context(), TAPS).maps["features"]["p3"], features["p3"])


# -- by the name of the zoo -----------------------------------------------------------------------


class Mirror(PathHandler):
    """The zoo's server: one file under every address, or none where the folder is missing."""

    def __init__(self, file):
        self.file, self.asked = file, []

    def _get_supported_prefixes(self):
        return [ZOO]

    def _get_local_path(self, path, force=False, **kwargs):
        self.asked.append(path)
        if not self.file:
            raise URLError("[Errno -3] Temporary failure in name resolution")
        return self.file

    def _isfile(self, path):
        return True


@pytest.fixture
def mirror(files):
    handler = Mirror(files[1])
    PathManager.register_handler(handler)
    yield handler
    PathManager._path_handlers.pop(ZOO)


def test_a_zoo_name_stands_for_what_the_zoo_trained():
    trained = ZOO + "retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl"
    assert Teacher(config_file=R101).weights_file == trained
    assert Teacher(config_file=R101, weights="own.pth").weights_file == "own.pth"
    sources = {"TEACHER": {"TYPE": "Teacher", "CONFIG_FILE": R101}}
    cfg = configs.merged({"FPN": configs.FPN}, SOURCES=sources)
    assert Teacher(config_file=cfg.KD.SOURCES.TEACHER.CONFIG_FILE).weights_file == trained
    lazy = "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"
    assert "model_final_f96b26.pkl" in Teacher(config_file=lazy).weights_file


def test_other_configs_keep_their_weights(files, tmp_path):
    assert zoo_checkpoint(str(CONFIGS / "COCO-Detection/retinanet_R_18_FPN_1x.yaml")) is None
    assert zoo_checkpoint(str(tmp_path / R101)) is None
    copy = shutil.copy(CONFIGS / R101, tmp_path)
    text = Path(copy).read_text().replace("../Base", str(CONFIGS / "Base"))
    Path(copy).write_text(text)
    assert "ImageNetPretrained" in Teacher(config_file=copy).weights_file


def test_the_zoos_weights_are_fetched_and_read_strictly(files, mirror, tmp_path, monkeypatch):
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    (tmp_path / "COCO-Detection").mkdir()
    shutil.copy(files[0], tmp_path / name)
    monkeypatch.setattr("kd_det.paths.CONFIGS", tmp_path)
    mirror.file = str(shutil.copy(files[1], tmp_path / "model_final.pth"))
    imitates(Teacher(config_file=name), files)
    assert ZOO + "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl" in mirror.asked


def test_without_a_network_the_error_says_what_to_do(mirror):
    mirror.file = None
    source = Teacher(config_file=R101)
    assert source.shapes(("features",))
    with pytest.raises(SourceUnavailable) as e:
        source.prepare(("features",))
    assert "The teacher of " in str(e.value)
    assert f"'{source.weights_file}' cannot be had (URLError: " in str(e.value)
    assert "Temporary failure in name resolution" in str(e.value)
    assert "fetch that file elsewhere and set WEIGHTS to it" in str(e.value)


# -- a checkpoint that carries its config ---------------------------------------------------------


@pytest.fixture
def run(files, tmp_path):
    """The folder of a run: its checkpoint alone."""
    shutil.copy(files[1], tmp_path / "model_final.pth")
    return tmp_path


def weights_of(run):
    return Teacher(weights=str(run / "model_final.pth"))


def save_with(run, files, **entries):
    model = torch.load(files[1])["model"]
    torch.save({"model": model, **entries}, run / "model_final.pth")


@pytest.mark.parametrize("key", ["cfg", "config"])
@pytest.mark.parametrize("kind", ["text", "dict"])
def test_inside(files, run, key, kind):
    text = Path(files[0]).read_text()
    save_with(run, files, **{key: text if kind == "text" else yaml.safe_load(text)})
    (run / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: Another}")  # what is inside wins
    source = weights_of(run)
    assert [s.channels for s in source.shapes(TAPS)["features"]] == [16] * 5
    imitates(source, files)
    assert f"model_final.pth['{key}']" in source._origin.config.path


def test_beside_as_detectron2_leaves_it(files, run):
    shutil.copy(files[0], run / "config.yaml")
    imitates(weights_of(run), files)


def test_beside_as_a_distilled_run_leaves_it(files, run):
    cfg = toys.distiller_cfg(files, fpn=16)
    (run / "config.yaml").write_text(cfg.dump())
    imitates(weights_of(run), files)
    (run / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: Another}")
    (run / "student.yaml").write_text(student_config(cfg).dump())
    imitates(weights_of(run), files)


def test_beside_as_lazyconfig_leaves_it(tmp_path):
    def saved(model):
        LazyConfig.save(OmegaConf.create({"model": model}), str(tmp_path / "config.yaml"))
        return weights_of(tmp_path)._origin.config._cfg.model

    torch.save({"model": {}}, tmp_path / "model_final.pth")
    student = LazyCall(RetinaNet)(num_classes=7)
    assert saved(student).num_classes == 7
    distilled = LazyCall(kd_det.Distiller)(student=student, max_iter=3)
    assert saved(distilled).num_classes == 7


def test_no_config_names_what_was_looked_for(run):
    with pytest.raises(ValueError, match=r"carry no config") as e:
        weights_of(run).shapes(TAPS)
    for word in ("model_final.pth'", "'cfg' or 'config'", str(run), "student.yaml or config.yaml"):
        assert word in str(e.value)
    with pytest.raises(SourceUnavailable, match=r"no weights file 'nowhere\.pth'"):
        Teacher(weights="nowhere.pth").shapes(TAPS)


class Harm:
    def __reduce__(self):
        return pytest.fail, ("code of the checkpoint was run",)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Harm(), "cannot be read to see whether it carries a config"),
        ("MODEL: !!python/object/apply:pytest.fail [run]", r"\['cfg'\]' cannot be read"),
        ("_BASE_: ../Base.yaml", "has a _BASE_"),
        ("- a list", "it is a list"),
        ({"MODEL": {"NO_SUCH": 1}}, "NO_SUCH"),
    ],
    ids=["pickle", "yaml tag", "base", "no map", "unknown key"],
)
def test_a_config_inside_is_read_safely(files, run, entry, words):
    save_with(run, files, cfg=entry)
    with pytest.raises(ValueError, match=words):
        weights_of(run).shapes(TAPS)
