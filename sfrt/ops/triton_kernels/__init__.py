"""The Triton kernels, one file per op; imported when one is asked for."""
