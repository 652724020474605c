"""The engine's own kernels for CPUs: a C++ library built at first use, and the runner that computes with it."""
