"""Terms: one small class per published method, added to the student's loss."""

from kd_det.terms.at import AT
from kd_det.terms.box_head import BoxHead
from kd_det.terms.channel_distillation import ChannelDistillation
from kd_det.terms.consistency import Consistency
from kd_det.terms.cwd import CWD
from kd_det.terms.fgfi import FGFI
from kd_det.terms.fitnet import FitNet
from kd_det.terms.fkd import FKD
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.logit_box import LogitBoxKD
from kd_det.terms.pi import PI
from kd_det.terms.pkd import PKD
from kd_det.terms.rpn import RPN
from kd_det.terms.term import Term

__all__ = [
    "AT",
    "CWD",
    "FGFI",
    "FKD",
    "PI",
    "PKD",
    "RPN",
    "BoxHead",
    "ChannelDistillation",
    "Consistency",
    "FitNet",
    "LevelwiseTerm",
    "LogitBoxKD",
    "Term",
]
