"""In which order the four directions of the scan visit the pixels of a map."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MOST_KEPT = 64  # orders; an image size takes up to six
_kept: OrderedDict[tuple, tuple[Tensor, Tensor]] = OrderedDict()
_lock = threading.Lock()  # of _kept
_readers: list[list[tuple[Tensor, Tensor]]] = []


def scan_orders(
    height: int,
    width: int,
    scan: str,
    window: int,
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """For each direction the pixel that step l visits, and the step that visits pixel p; (4, L).

    The latest are kept, and made once.
    """
    if torch.compiler.is_compiling():
        return _make_orders(height, width, scan, window, device, dtype)
    key = (height, width, scan, window, device, dtype)
    with _lock:
        orders = _kept.get(key)
        if orders is not None:
            _kept.move_to_end(key)
    if orders is None:
        orders = _make_orders(height, width, scan, window, device, dtype)
        is_recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if is_recorded or type(orders[0]) is not Tensor:  # no values yet; a tracer's stand-in
            return orders
        with _lock:
            _kept[key] = orders
            if len(_kept) > _MOST_KEPT:
                _kept.popitem(last=False)
    for reader in _readers:
        reader.append(orders)
    return orders


@contextmanager
def orders_read() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """A list of the orders that are asked for meanwhile.

    A CUDA graph reads them again at each replay, so that whoever records one must hold them.
    """
    reader: list[tuple[Tensor, Tensor]] = []
    _readers.append(reader)
    try:
        yield reader
    finally:
        _readers.remove(reader)


def _make_orders(
    height: int, width: int, scan: str, window: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for training, even if evaluation comes first
        pixel = torch.arange(height * width, device=device)
        row, column = pixel // width, pixel % width
        side_y, side_x = (height, width) if scan == "cross" else (window, window)
        tile = (row // side_y) * width + column // side_x
        rows_first = torch.argsort((tile * height + row) * width + column)
        columns_first = torch.argsort((tile * width + column) * height + row)
        forward = torch.stack([rows_first, columns_first])
        order = torch.cat([forward, forward.flip(1)])
        return order.to(dtype), torch.argsort(order, dim=1).to(dtype)
