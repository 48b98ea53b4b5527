"""CUDA kernels: sources, run-time compilation, operators. Importing this does nothing on a GPU."""
