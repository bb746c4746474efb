"""Layer normalisation over the channels of a map: one public function, two backends."""

from models.ops.channel_norm.dispatch import channel_norm

__all__ = ["channel_norm"]
