"""The network. build_model(config) is the way in; the parts know nothing of configs or files."""

from models.build import build_model, check_scan_backend
from models.cmfs import CMFS, CMFSOutput

__all__ = ["CMFS", "CMFSOutput", "build_model", "check_scan_backend"]
