"""Kernels that turn quantized blocks into floats. Import them as ``numaload.kernels``."""

# A second name would be a second set of the vocabulary, of which numba takes only its own. With
# this checkout as working folder others ask for Hugging Face's package ``kernels``: they get it, or
# what looks to them like a folder without a package.
if __name__ != "numaload.kernels":
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _here = os.path.dirname(os.path.realpath(__file__))
    _spec = PathFinder.find_spec(
        __name__,
        [path for path in sys.path if os.path.realpath(os.path.join(path, __name__)) != _here],
    )
    __file__, __path__ = None, []  # type: ignore[assignment]
    if _spec is not None and _spec.origin and _spec.loader:
        sys.modules[__name__] = _module = module_from_spec(_spec)
        _spec.loader.exec_module(_module)
