"""SS2D's four-direction selective scan over a map: one public function, several backends."""

from models.ops.ss2d_scan.dispatch import ss2d_scan

__all__ = ["ss2d_scan"]
