"""Image anomaly detection when the training set cannot be trusted: the code of the HierCore book."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hclib")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"
