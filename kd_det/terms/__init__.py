"""Terms: one small class per published method, added to the student's loss."""

from kd_det.terms.cwd import CWD
from kd_det.terms.levelwise import LevelwiseTerm
from kd_det.terms.term import Term

__all__ = ["CWD", "LevelwiseTerm", "Term"]
