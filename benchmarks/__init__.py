"""
What distillation costs, measured: ``python -m benchmarks`` runs all, ``python -m benchmarks.loss``
one of them. Variants take turns in one process; ratios are formed within a repetition.
"""

import os

# Before torch is imported: its profiler, which counts memory here, greets on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import kd_det  # noqa: F401  # before any of Detectron2, whose v0.6 needs it

NAMES = ("loss", "teacher", "step", "method_cost", "scaling", "time_to_accuracy")
