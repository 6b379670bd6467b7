"""Stand-in for ``detectron2._C``, the compiled operators of Detectron2.

Detectron2 0.6 imports ``_C`` even for models that need none of its operators. This file takes its
place in two ways: ``kd_det._compat`` loads it under that name when the real one is missing, and
``make setup`` copies it to ``detectron2/_C.py`` in the environment that it made itself. So it
imports nothing of kd_det.
"""

from collections.abc import Callable
from typing import NoReturn

KD_DET_STUB = True  # how kd_det tells this file from the compiled extension


def get_compiler_version() -> str:
    """Answer Detectron2's environment report."""
    return "none (kd_det stub, operators not compiled)"


def get_cuda_version() -> str:
    """Answer Detectron2's environment report."""
    return "none (kd_det stub, operators not compiled)"


def has_cuda() -> bool:
    """Answer Detectron2's environment report: there is no CUDA code here."""
    return False


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Python itself probes modules for dunder names (__path__, __all__, ...).
    if name.startswith("__"):
        raise AttributeError(f"module 'detectron2._C' (kd_det stub) has no attribute {name!r}")

    def operator(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"detectron2._C.{name} was called, but this Detectron2 was installed without its "
            "compiled operators (a stub of kd_det stands in for them). Use a model that needs no "
            "deformable or rotated operators, give COCOEvaluator use_fast_impl=False, or install "
            "a compiled Detectron2."
        )

    operator.__name__ = operator.__qualname__ = name
    return operator
