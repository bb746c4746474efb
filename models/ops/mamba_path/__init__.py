"""What surrounds the scan of a 1-D Mamba mixer: causal convolution with SiLU, and the z gate."""

from models.ops.mamba_path.dispatch import conv_silu, gate

__all__ = ["conv_silu", "gate"]
