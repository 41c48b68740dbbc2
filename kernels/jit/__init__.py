"""What makes machine code of kernels: all that knows numba, LLVM or the cache on disk."""


class SettingError(ValueError):
    """A variable or setting of numba's with which kernels cannot be compiled."""
