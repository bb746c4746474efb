"""The selective scan (S6) of Mamba: one public function, several backends."""

from models.ops.selective_scan.dispatch import BACKENDS, selective_scan

__all__ = ["BACKENDS", "selective_scan"]
