"""Numba kernels that turn quantized blocks into floats. Import them as ``numaload.kernels``."""

# Under a second name numba's disk cache would store code that cannot be loaded under the first.
if __name__ != "numaload.kernels":
    raise ImportError(f"import numaload.kernels, not {__name__}: the folder has one identity")
