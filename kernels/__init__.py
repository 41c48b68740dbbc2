"""Kernels that turn quantized blocks into floats. Import them as ``numaload.kernels``."""

# A second name would be a second set of the vocabulary, of which numba takes only its own.
if __name__ != "numaload.kernels":
    raise ImportError(f"import numaload.kernels, not {__name__}: the folder has one identity")
