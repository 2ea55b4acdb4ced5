"""Detectors: fit(train, labels) and score(test, labels) on Features."""

from hclib.methods.funad import FunAD
from hclib.methods.hiercore import HierCore
from hclib.methods.inreach import InReaCh
from hclib.methods.meds import BootstrappedMemory, MeDS
from hclib.methods.musc import MuSc, MuScPlus
from hclib.methods.patchcore import PatchCore
from hclib.methods.softpatch import SoftPatch
from hclib.methods.student_detector import StudentDetector

__all__ = [
    "BootstrappedMemory",
    "FunAD",
    "HierCore",
    "InReaCh",
    "MeDS",
    "MuSc",
    "MuScPlus",
    "PatchCore",
    "SoftPatch",
    "StudentDetector",
]
