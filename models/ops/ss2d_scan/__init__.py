"""SS2D's four-direction selective scan over a map: one public function, several backends."""

from models.ops.ss2d_scan.dispatch import ss2d_scan
from models.ops.ss2d_scan.orders import orders_read

__all__ = ["orders_read", "ss2d_scan"]
