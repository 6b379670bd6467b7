"""kd_det._compat on whichever Detectron2 is installed, and on imitations of the others.

Import order and the absence of modules are what is tested, so most tests start fresh interpreters.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.utils.events import EventStorage

from kd_det import _compat, _stub_C

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "kd_det" / "_stub_C.py"
RELEASE = _compat.d2_version() == "0.6"
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)

only_release = pytest.mark.skipif(not RELEASE, reason="about Detectron2 0.6, this one is later")

# Puts a Detectron2 without `_C` at the front, whatever is installed: the finder hides a placed
# stub, a compiled extension is not hidden (0.6 with one needs no stub).
HIDE_STUB = """
import importlib.machinery, sys
class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        return None if spec and name == "detectron2._C" and spec.origin.endswith(".py") else spec
sys.meta_path[:] = [Hide if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
# A Pillow as it is without the environment's own start-up line (tools/setup_env.py).
FORGET_LINEAR = """
import PIL.Image
vars(PIL.Image).pop("LINEAR", None)
"""


def run(code, *, path=(ROOT,), **environment):
    """Run code in a fresh interpreter; returns the finished process with its text output."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeeds(code, **kwargs):
    done = run(code, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def fake_detectron2(tmp_path):
    """A function that writes an imitation of Detectron2; returns the PYTHONPATH to use it."""

    def write(files, version="0.6"):
        package = tmp_path / "detectron2"
        package.mkdir()
        for name, text in {"__init__.py": f"__version__ = {version!r}\n", **files}.items():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text)
        return (tmp_path, ROOT)

    return write


# The imitation is installed after kd_det's own import found the real one, hence by file.
LOAD_COMPAT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compat", {str(ROOT / "kd_det" / "_compat.py")!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
"""


@pytest.fixture(scope="module")
def kd_det_first():
    """A process that imports kd_det before Detectron2; one for several tests, they take seconds."""
    return succeeds(
        HIDE_STUB + FORGET_LINEAR + "import importlib.util, kd_det\n"
        "kd_det._compat.prepare()\n"  # a second time, as a reload would
        "import detectron2.modeling, detectron2.data, detectron2.engine, detectron2.evaluation\n"
        "from detectron2.utils.collect_env import collect_env_info\n"
        "print(collect_env_info())\n"
        "import detectron2._C as a\n"
        "from detectron2 import _C as b\n"
        "print([a is b, a.__name__, a.__file__, importlib.util.find_spec('detectron2._C').origin])"
    )


class TestFreshInterpreter:
    def test_one_log_line(self, kd_det_first):
        lines = [line for line in kd_det_first.stderr.splitlines() if "stub" in line]
        assert len(lines) == RELEASE, kd_det_first.stderr

    def test_environment_report(self, kd_det_first):
        """`default_setup` prints it; it asks `_C` for versions."""
        assert "Compiler " in kd_det_first.stdout
        assert ("kd_det stub" in kd_det_first.stdout) == RELEASE

    @only_release
    def test_stub_is_a_proper_module(self, kd_det_first):
        expected = [True, "detectron2._C", str(STUB), str(STUB)]
        assert kd_det_first.stdout.splitlines()[-1] == str(expected)

    @only_release
    def test_submodules_before_kd_det(self, tmp_path):
        """What `make setup` places in its own environment is what such a script needs."""
        script = FORGET_LINEAR + "from detectron2.modeling import build_model\nimport kd_det\n"
        without = run(HIDE_STUB + script)
        assert without.returncode != 0
        assert "_C" in without.stderr

        # The installed Detectron2 with what setup places, as in a site-packages folder.
        import detectron2

        package = tmp_path / "detectron2"
        package.mkdir()
        for entry in Path(detectron2.__file__).parent.iterdir():
            if not entry.name.startswith("_C"):
                (package / entry.name).symlink_to(entry)
        setup_env.place_stub(package)
        placed = succeeds(
            FORGET_LINEAR + f"import site; site.addsitedir({str(tmp_path)!r})\n"
            "from detectron2.modeling import build_model\nimport kd_det\n"
            "import detectron2._C as c\nprint(c.__file__)\n"
            "assert not kd_det._compat.fast_coco_eval_available()\n",
            path=(tmp_path, ROOT),
        )
        assert placed.stdout.strip() == str(package / "_C.py")
        assert "stub" not in placed.stderr  # the log line is about stubs that kd_det put in place

    @pytest.mark.parametrize("there", ["_C.cpython-311-x86_64-linux-gnu.so", "utils/develop.py"])
    def test_setup_places_nothing_beside_main_or_an_extension(self, tmp_path, there):
        file = tmp_path / "detectron2" / there
        file.parent.mkdir(parents=True)
        file.touch()
        setup_env.place_stub(tmp_path / "detectron2")
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file]

    def test_no_detectron2(self):
        done = run(
            "import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda n, p=None: None if n == 'detectron2' else real(n, p)\n"
            "import kd_det"
        )
        assert done.returncode != 0
        assert "has no module 'detectron2'" in done.stderr
        assert "make setup" in done.stderr


class TestImitations:
    def test_real_extension_is_kept(self, fake_detectron2):
        path = fake_detectron2({"_C.py": "def COCOevalEvaluateImages(): ...\nreal = True\n"})
        done = succeeds(
            LOAD_COMPAT + "compat.prepare()\n"
            "import detectron2._C as c\n"
            "print(c.real, compat.fast_coco_eval_available())",
            path=path,
        )
        assert done.stdout.split() == ["True", "True"]
        assert "stub" not in done.stderr

    def test_broken_extension_shows_its_error(self, fake_detectron2):
        """A compiled `_C` that does not load (another torch) is not hidden behind a stub."""
        path = fake_detectron2({"_C.py": "raise ImportError('undefined symbol')\n"})
        done = run(LOAD_COMPAT + "compat.prepare()\nfrom detectron2 import _C", path=path)
        assert done.returncode != 0
        assert "undefined symbol" in done.stderr

    def test_main_without_extension_gets_no_stub(self, fake_detectron2):
        path = fake_detectron2({"utils/develop.py": ""})
        done = succeeds(
            LOAD_COMPAT + "compat.prepare()\n"
            "print(compat.d2_version(), 'detectron2._C' in sys.modules,"
            " compat.fast_coco_eval_available())",
            path=path,
        )
        assert done.stdout.split() == ["main", "False", "False"]

    @pytest.mark.parametrize(
        ("files", "version", "expected"),
        [
            ({}, "0.6", "0.6"),
            ({"utils/develop.py": ""}, "0.6", "main"),
            ({"utils/develop.py": ""}, "0.7", "0.7"),
        ],
    )
    def test_version(self, fake_detectron2, files, version, expected):
        path = fake_detectron2(files, version)
        assert succeeds(LOAD_COMPAT + "print(compat.d2_version())", path=path).stdout == (
            expected + "\n"
        )


class TestStub:
    def test_answers(self):
        assert _stub_C.has_cuda() is False
        assert isinstance(_stub_C.get_compiler_version(), str)
        assert isinstance(_stub_C.get_cuda_version(), str)

    @pytest.mark.parametrize("name", ["nms_rotated", "deform_conv_forward", "InstanceAnnotation"])
    def test_operator_raises_on_use(self, name):
        operator = getattr(_stub_C, name)  # Detectron2 looks them up at import time
        with pytest.raises(RuntimeError, match=rf"_C\.{name} was called.*compiled operators"):
            operator(1, key=2)

    def test_dunder_names(self):
        with pytest.raises(AttributeError, match="__path__"):
            _ = _stub_C.__path__

    @only_release
    def test_operator_through_detectron2(self):
        import detectron2._C
        import torch
        from detectron2.layers.rotated_boxes import pairwise_iou_rotated

        if not getattr(detectron2._C, "KD_DET_STUB", False):
            pytest.skip("this Detectron2 0.6 is compiled")
        with pytest.raises(RuntimeError, match=r"box_iou_rotated was called.*compiled operators"):
            pairwise_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))


class TestRemovedNames:
    @only_release
    def test_pillow(self):
        from PIL import Image

        assert Image.LINEAR == Image.BILINEAR

    @only_release
    def test_class_histogram(self):
        """Without np.int, 0.6 loses the table of classes that it logs for a training set."""
        from detectron2.data.build import print_instances_class_histogram

        annotation = {"category_id": 0, "iscrowd": 0}
        print_instances_class_histogram([{"annotations": [annotation]}], ["thing"])

    def test_present_names_are_left_alone(self, monkeypatch):
        from PIL import Image

        monkeypatch.setattr(Image, "LINEAR", "mine", raising=False)
        monkeypatch.setattr(np, "int", "mine", raising=False)
        before = np.bool
        _compat.restore_removed_names()
        assert (Image.LINEAR, vars(np)["int"], np.bool) == ("mine", "mine", before)

    @pytest.mark.skipif(RELEASE, reason="about a later Detectron2 than this 0.6")
    def test_nothing_is_added_for_main(self):
        succeeds("import kd_det, numpy; assert 'int' not in vars(numpy)")


class TestQuestions:
    def test_event_storage(self):
        assert _compat.get_event_storage_or_none() is None
        with EventStorage(5) as storage:
            assert _compat.get_event_storage_or_none() is storage
        assert _compat.get_event_storage_or_none() is None

    @pytest.mark.parametrize("error", [AssertionError, IndexError])  # the latter: `python -O`
    def test_event_storage_errors(self, monkeypatch, error):
        def get_event_storage():
            raise error

        monkeypatch.setattr("detectron2.utils.events.get_event_storage", get_event_storage)
        assert _compat.get_event_storage_or_none() is None

    def test_fast_coco_eval(self):
        """It is offered exactly when the operators behind it can be called."""
        try:
            module = importlib.import_module("detectron2._C")
            module.InstanceAnnotation(1, 0.5, 1.0, False, False)
            works = True
        except (ImportError, RuntimeError):
            works = False
        assert _compat.fast_coco_eval_available() is works
