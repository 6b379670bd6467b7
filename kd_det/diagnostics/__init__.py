"""What a run says of itself: scalars, images and sentences, without waiting for the device."""

from kd_det.diagnostics.diagnostics import Diagnostics
from kd_det.diagnostics.levels import put_levels
from kd_det.diagnostics.non_finite import LastValues
from kd_det.diagnostics.scalars import ScalarQueue
from kd_det.diagnostics.step import Learner, Step

__all__ = ["Diagnostics", "LastValues", "Learner", "ScalarQueue", "Step", "put_levels"]
