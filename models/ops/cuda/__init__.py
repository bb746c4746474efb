"""CUDA kernels that are compiled when first used, by the compiler that comes with PyTorch."""
