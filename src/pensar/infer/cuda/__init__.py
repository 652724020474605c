"""The engine's own kernels for NVIDIA GPUs, in Triton, and the runner that computes with them by CUDA graphs."""
