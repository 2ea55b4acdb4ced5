"""Detectors: fit(train, labels) and score(test, labels) on Features."""
