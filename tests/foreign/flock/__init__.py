"""A project on Detectron2 as somebody would write it who has never heard of kd_det."""

from flock.config import add_flock_config
from flock.data import register_flocks
from flock.modeling import FlockBoxHead, FlockRCNN
from flock.training import FlockTrainer

__all__ = ["FlockBoxHead", "FlockRCNN", "FlockTrainer", "add_flock_config", "register_flocks"]
