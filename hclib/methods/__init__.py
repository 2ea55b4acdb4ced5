"""Detectors: fit(train, labels) and score(test, labels) on Features."""

from hclib.methods.hiercore import HierCore
from hclib.methods.musc import MuSc, MuScPlus
from hclib.methods.patchcore import PatchCore

__all__ = ["HierCore", "MuSc", "MuScPlus", "PatchCore"]
