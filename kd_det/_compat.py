"""The only room that asks which Detectron2 this is.

Two are supported: the v0.6 Python sources without compiled operators, and Detectron2 main. Nothing
of Detectron2 is changed; what 0.6 misses is put back around it (a module under a free name, names
that Pillow and NumPy removed).
"""

import functools
import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)

_C_NAME = "detectron2._C"

# Removed in NumPy 1.24; 0.6 still uses them in the class histogram of the training set (where the
# AttributeError is swallowed and the table lost), the semantic segmentation evaluator, masks and
# Pascal VOC.
_NUMPY_ALIASES = {"bool": bool, "float": float, "int": int, "str": str}


def prepare() -> None:
    """Make the installed Detectron2 importable; called before kd_det imports any of it.

    Raises:
        ImportError: Detectron2 is not installed.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "kd_det extends Detectron2, but this Python has no module 'detectron2' "
            f"({sys.executable}). Install Detectron2 for your torch, or run `make setup` in the "
            "kd_det checkout for an environment that has both."
        )
    if d2_version() == "0.6":
        install_stub()
        restore_removed_names()


@functools.cache
def d2_version() -> str:
    """Which Detectron2 this is.

    Returns:
        ``"0.6"`` for the release, ``"main"`` for everything after it that still calls itself 0.6
        (as Detectron2 main does), otherwise its own version.
    """
    import detectron2

    # The file came with the change that made compiled operators optional (January 2022).
    after_release = (Path(detectron2.__file__).parent / "utils" / "develop.py").is_file()
    return "main" if after_release and detectron2.__version__ == "0.6" else detectron2.__version__


def install_stub() -> bool:
    """Put a stand-in under ``detectron2._C`` when there is no such module.

    A compiled ``_C`` that is there but fails to load stays: hiding a broken build would only move
    the error. Detectron2 main is not given a stub (`prepare`): it notices the absence by itself
    and would take a stub for the real thing.

    Returns:
        Whether the stand-in was put in place by this call.
    """
    if _C_NAME in sys.modules or importlib.util.find_spec(_C_NAME) is not None:
        return False
    import detectron2

    # A spec of its own: Detectron2's environment report asks for origin and __file__.
    spec = importlib.util.spec_from_file_location(_C_NAME, Path(__file__).with_name("_stub_C.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_C_NAME] = module
    detectron2._C = module  # as an import would have done
    logger.warning(
        "Detectron2 %s has no compiled operators: kd_det put a stub of detectron2._C in place; "
        "deformable and rotated operators will raise when used.",
        detectron2.__version__,
    )
    return True


def restore_removed_names() -> None:
    """Give Pillow and NumPy back the names that Detectron2 0.6 uses, where they are gone."""
    import numpy
    from PIL import Image

    if not hasattr(Image, "LINEAR"):  # removed in Pillow 10
        Image.LINEAR = Image.Resampling.BILINEAR  # type: ignore[attr-defined]  # gone
    for name, builtin in _NUMPY_ALIASES.items():
        # Not hasattr: NumPy answers for removed names with warnings of its own.
        if name not in vars(numpy):
            setattr(numpy, name, builtin)


def fast_coco_eval_available() -> bool:
    """Whether ``COCOEvaluator(use_fast_impl=True)`` works: compiled operators, not a stub.

    With a stub in place 0.6 believes that they are compiled, so evaluators must be told.
    """
    try:
        module = importlib.import_module(_C_NAME)
    except ImportError:
        return False
    return not getattr(module, "KD_DET_STUB", False) and hasattr(module, "COCOevalEvaluateImages")


def get_event_storage_or_none() -> "EventStorage | None":
    """Return the EventStorage in use, or None outside of any (0.6 has no way to ask)."""
    events: Any = importlib.import_module("detectron2.utils.events")
    try:
        return events.get_event_storage()
    except (AssertionError, IndexError):  # IndexError: under `python -O`
        return None


def tracing_adapter() -> Any:
    """
    Detectron2's ``TracingAdapter``. In 0.6 its package opens by importing Caffe2, which PyTorch no
    longer has and this class does not need: there its own file is imported alone.
    """
    try:
        package: Any = importlib.import_module("detectron2.export")
    except ImportError:
        spec = importlib.util.find_spec("detectron2.export")
        assert spec is not None
        package = types.ModuleType(spec.name)
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[spec.name] = package
        try:
            package = importlib.import_module("detectron2.export.flatten")
        finally:
            del sys.modules[spec.name]  # who imports the package meets what they would have met
    return package.TracingAdapter


def create_local_process_group(workers_per_machine: int) -> None:
    """
    Tell Detectron2 which processes share a machine; `detectron2.engine.launch` does this for its
    own children, torchrun's children need it too.

    Args:
        workers_per_machine: the same on every machine.
    """
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(workers_per_machine)
        return
    import torch.distributed as dist

    machines = dist.get_world_size() // workers_per_machine
    for machine in range(machines):
        ranks = list(range(machine * workers_per_machine, (machine + 1) * workers_per_machine))
        group = dist.new_group(ranks)  # every process creates every group
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group  # where 0.6's own launch puts it
