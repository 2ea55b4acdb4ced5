"""Detectors: fit(train, labels) and score(test, labels) on Features."""

from hclib.methods.funad import FunAD
from hclib.methods.hiercore import HierCore
from hclib.methods.inreach import InReaCh
from hclib.methods.musc import MuSc, MuScPlus
from hclib.methods.patchcore import PatchCore
from hclib.methods.softpatch import SoftPatch

__all__ = ["FunAD", "HierCore", "InReaCh", "MuSc", "MuScPlus", "PatchCore", "SoftPatch"]
