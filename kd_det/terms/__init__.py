"""Terms: one small class per published method, added to the student's loss."""

from kd_det.terms.box_head import BoxHead
from kd_det.terms.cwd import CWD
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.rpn import RPN
from kd_det.terms.term import Term

__all__ = ["CWD", "RPN", "BoxHead", "LevelwiseTerm", "Term"]
