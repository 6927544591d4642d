"""The kernels of csrc/, one file per op; the library is opened when one is asked for."""
