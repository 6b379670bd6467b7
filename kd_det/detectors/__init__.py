"""What must be known of a meta-architecture: tap presets, how to run it to its head, anchors."""

from kd_det.detectors.declared import Declared
from kd_det.detectors.dense import DenseDetector
from kd_det.detectors.detector import (
    Detector,
    describe,
    meta_copy,
    probe,
    running_values,
    set_running_values,
)
from kd_det.detectors.generic import AnyModule
from kd_det.detectors.rcnn import GeneralizedRCNN
from kd_det.detectors.semantic import PanopticFPN, SemanticSegmentor
from kd_det.detectors.shapes import Depth, RoiHead, TapShape

__all__ = [
    "AnyModule",
    "Declared",
    "DenseDetector",
    "Depth",
    "Detector",
    "GeneralizedRCNN",
    "PanopticFPN",
    "RoiHead",
    "SemanticSegmentor",
    "TapShape",
    "describe",
    "meta_copy",
    "probe",
    "running_values",
    "set_running_values",
]
