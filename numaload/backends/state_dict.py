"""``load_state_dict``: a torch module's parameters from a file, in parallel and in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numaload.dequantize import DTYPES
from numaload.dtypes import KERNEL_DTYPES, NAMES, dtype_name, kernel_dtype
from numaload.errors import StateDictError, UsageError, listed, printable
from numaload.files.reader import Progress
from numaload.machine import memory
from numaload.pipeline import Target, fill
from numaload.torch_memory import (
    array_of,
    checked_device,
    empty,
    float_dtype,
    import_torch,
    torch_type,
)
from numaload.weights import Tensor, Weights

NameMap = Mapping[str, str] | Callable[[str], str | None]
EXTRA_STATE = "_extra_state"  # torch's name for what a module keeps that is no parameter


@dataclass
class _Held:
    """A parameter or buffer of the module, and all places that it has: tied ones have several.

    places: its key, and the _parameters or _buffers of a part that has it under the last name.
    """

    old: Any  # torch's
    places: list[tuple[str, Any, str]]
    source: Any = None  # what is to go there: a Tensor, or torch's
    dtype: Any = None
    device: Any = None
    new: Any = None

    @property
    def in_place(self) -> bool:
        """Return whether it can be filled in the memory that it has."""
        return self.same and self.old.device.type == "cpu" and self.old.is_contiguous()

    @property
    def same(self) -> bool:
        """Return whether the module keeps its own tensor: dtype and device stay."""
        old = self.old
        return (old.dtype, old.device) == (self.dtype, self.device) and old.device.type != "meta"

    @property
    def direct(self) -> bool:
        """Return whether kernels or reading make exactly what is wanted, without torch."""
        if not isinstance(self.source, Tensor) or self.device.type != "cpu":
            return False
        name, tensor = dtype_name(self.dtype), self.source
        as_it_is = NAMES.get(tensor.type_name) == name and tensor.byte_order == "little"
        made = as_it_is or (tensor.has_kernel and name in KERNEL_DTYPES)
        return made and (self.in_place or not self.same)


def load_state_dict(
    module: Any,
    weights: Weights,
    name_map: NameMap | None = None,
    dtype: Any = None,
    device: Any = None,
    *,
    strict: bool = True,
    progress: Progress | None = None,
) -> Any:
    """Fill a torch module from a GGUF or safetensors model; return what torch's own returns.

    It is torch's own ``load_state_dict`` that decides what goes where, with the module's hooks and
    its words for errors; numaload reads and converts, all tensors in the order of the files.
    name_map: {module key: tensor name} or a function from one to the other, for files that have
    other names than the module.
    dtype: of floating-point parameters and buffers; by default what they have.
    device: by default where they are, and the CPU for those on the meta device, which get new
    memory, in huge pages. Parameters whose dtype and device stay are filled in place; nothing is
    held twice.
    strict, missing and unexpected keys, sizes: torch's; but of tied parameters one name is enough.
    progress(bytes of the files done, in all): False cancels.
    Raises: StateDictError (a RuntimeError), also for what would stay on the meta device;
    NodeMemoryError, UsageError, UnsupportedTypeError, UnknownQuantTypeError: all before anything is
    touched; ReadError, FileChangedError, CancelledError: then parameters that are filled in place
    may be partly new, and no others have changed.
    """
    torch = import_torch()
    if not isinstance(weights, Weights):
        raise UsageError(f"weights: expected what numaload.open returns, found {weights!r}")
    device = None if device is None else checked_device(device)
    held = _held(module)
    result = _record(module, weights, _names(module, weights, name_map), held, strict=strict)
    loads = [one for one in held.values() if one.source is not None]
    for one in loads:
        one.dtype, one.device = _wanted(one, dtype, device)
    _check_places(module, loads)
    _check_meta(module, held)
    for one in loads:
        if isinstance(one.source, Tensor):
            _check_type(one.source, dtype_name(one.dtype))
    _check_room(loads)
    with torch.no_grad():
        _Filling(loads, progress).run()
        for one in loads:
            if not one.same:
                _assign(one)
    return result


def _held(module: Any) -> dict[int, _Held]:
    """Map the id of each parameter and buffer to where the module holds it."""
    found: dict[int, _Held] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for table in (part._parameters, part._buffers):  # noqa: SLF001
            for leaf, tensor in table.items():
                if tensor is not None:
                    place = (f"{path}.{leaf}" if path else leaf, table, leaf)
                    found.setdefault(id(tensor), _Held(tensor, [])).places.append(place)
    return found


def _names(module: Any, weights: Weights, name_map: NameMap | None) -> dict[str, str]:
    """Return {key of the module: name of the tensor} for what the file has."""
    if name_map is None:
        return {name: name for name in weights}
    if not callable(name_map) and not hasattr(name_map, "get"):
        raise UsageError(f"name_map: expected a dict or a function, found {name_map!r}")
    found: dict[str, str] = {}
    for key in module.state_dict(keep_vars=True):
        name = name_map(key) if callable(name_map) else name_map.get(key, key)
        if not isinstance(name, str | None):
            raise UsageError(
                f"name_map: expected a tensor's name or None for {key!r}, found {name!r}"
            )
        if name is not None and name in weights:
            found[key] = name
    return found


def _sources(
    module: Any, weights: Weights, names: dict[str, str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return {key of the module: tensor}, and the names of scales that are applied to these.

    Modules that are quantized themselves, and have scales of their own, get what is stored.
    """
    wanted = module.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    for given, name in names.items():
        tensor = weights[name]
        key = tensor.weight_name if given not in wanted else given
        dtype = getattr(wanted.get(key), "dtype", None)
        floats = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        found[key if key in wanted else given] = tensor if floats else tensor.as_stored()
    applied = {name for tensor in found.values() for name in tensor.scale_names}
    kept = {k: tensor for k, tensor in found.items() if k in wanted or tensor.name not in applied}
    return kept, applied


def _record(
    module: Any, weights: Weights, names: dict[str, str], held: dict[int, _Held], *, strict: bool
) -> Any:
    """Have torch's own load: note in ``held`` what goes where. Raises: StateDictError."""
    from numaload.backends.torch_copies import Recording, StandIn, stand_in

    sources, applied = _sources(module, weights, names)
    unused = weights.keys() - {tensor.name for tensor in sources.values()} - applied
    state = {key: stand_in(tensor) for key, tensor in sources.items()}
    state |= {key: one.values() for key, one in state.items() if key.endswith(EXTRA_STATE)}
    recording = Recording(one.old for one in held.values())
    seen: Any = None

    def adjust(_: Any, keys: Any) -> None:
        nonlocal seen
        seen = keys
        keys.unexpected_keys.extend(name for name in weights if name in unused)
        filled = {key for one in recording.copies for key, *_ in held[one].places}
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in filled]

    hooks = module._load_state_dict_post_hooks  # noqa: SLF001 - scripted ones register none
    hooks[adjust] = adjust
    try:
        with recording:
            result = module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        missing, unexpected = seen or ((), ())
        text = str(error.args[0]).replace(":", f" from {printable(weights.paths[0])}:", 1)
        raise StateDictError(text, missing=missing, unexpected=unexpected) from error
    finally:
        del hooks[adjust]
    for one, source in recording.copies.items():
        held[one].source = source.tensor if isinstance(source, StandIn) else source
    return result


def _wanted(one: _Held, dtype: Any, device: Any) -> tuple[Any, Any]:
    """Return the dtype and the device that a tensor is to have."""
    device = device or ("cpu" if one.old.device.type == "meta" else one.old.device)
    device = import_torch().device(device)
    stays = dtype is None or not one.old.dtype.is_floating_point
    return one.old.dtype if stays else float_dtype(dtype), device


def _check_places(module: Any, loads: list[_Held]) -> None:
    """Check that new tensors can be put into the module. Raises: StateDictError."""
    places = [place for one in loads if not one.same for place in one.places]
    names = [key for key, table, _ in places if not isinstance(table, dict)]  # torch.jit's refuse
    if names:
        raise StateDictError(
            f"{type(module).__name__}: {listed(names)} cannot be replaced in a scripted module."
            " Nothing was loaded: load before it is scripted, or without dtype= and device="
        )


def _check_meta(module: Any, held: dict[int, _Held]) -> None:
    """Check the meta device. Raises: StateDictError for what would stay on it."""
    bare = [one for one in held.values() if one.old.device.type == "meta" and one.source is None]
    left = [key for one in bare for key, *_ in one.places]
    if left:
        raise StateDictError(
            f"{type(module).__name__}: {listed(left)} would be left on the meta device: the file"
            " does not hold them. Nothing was loaded: make the module in memory, or with only its"
            " parameters on meta, as accelerate.init_empty_weights() does; models of transformers"
            " are loaded by their own from_pretrained, see numaload's docs/transformers.md",
            missing=left,
        )


def _check_type(tensor: Tensor, dtype: str) -> None:
    """Check the type. Raises: UnknownQuantTypeError, UnsupportedTypeError."""
    tensor.check_type()
    if tensor.has_kernel:
        tensor.conversion(DTYPES[kernel_dtype(dtype)])
    else:
        tensor.check_scales(dtype)
        tensor.check_native()
        torch_type(tensor.type_name)


def _check_room(loads: list[_Held]) -> None:
    """Check that memory has room: else Linux kills a process later. Raises: NodeMemoryError."""
    new = [one for one in loads if not one.in_place and one.device.type == "cpu"]
    nbytes = sum(one.old.numel() * one.dtype.itemsize for one in new)
    if nbytes:
        memory.require(nbytes, "the new parameters", "nothing was loaded: free memory")


class _Filling:
    """Fill in two steps: first, in parallel and in file order, what kernels or reading put straight
    into place; then, one by one, what torch converts or moves to another device.
    """

    def __init__(self, loads: list[_Held], progress: Progress | None) -> None:
        self.loads, self.progress, self.done = loads, progress, 0
        self.total = sum(_nbytes(one) for one in loads)

    def run(self) -> None:
        direct = [one for one in self.loads if one.direct]
        for one in direct:
            one.new = one.old if one.in_place else empty(one.old.shape, one.dtype)
        targets = sorted(map(_target, direct), key=lambda target: target.order)
        fill(targets, progress=self._report())
        self.done = sum(target.nbytes for target in targets)
        for one in self.loads:
            if not one.direct:
                self._stage(one)
                self.done += _nbytes(one)

    def _report(self) -> Progress | None:
        before, total, progress = self.done, self.total, self.progress
        return progress and (lambda done, _: progress(before + done, total))

    def _stage(self, one: _Held) -> None:
        """Have torch copy the values, from memory that only they take."""
        from numaload.backends.torch_copies import stand_in

        torch, values = import_torch(), one.source
        if isinstance(values, Tensor):
            values = stand_in(values).values(dtype_name(one.dtype), self._report())
        if not one.same:
            one.new = values.to(one.device, one.dtype, copy=values is one.source)
        else:
            # Only within inference_mode may its tensors be written to; without, it turns grad on.
            with torch.inference_mode(one.old.is_inference()), torch.no_grad():
                one.old.copy_(values)


def _nbytes(one: _Held) -> int:
    return one.source.nbytes if isinstance(one.source, Tensor) else 0


def _target(one: _Held) -> Target:
    name = dtype_name(one.dtype)
    return Target(one.source, array_of(one.new), name if name in KERNEL_DTYPES else None)


def _assign(one: _Held) -> None:
    """Put the new tensor wherever the module holds the old one."""
    torch = import_torch()
    new = one.new
    if isinstance(one.old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=one.old.requires_grad)
        new.__dict__.update(one.old.__dict__)
    for _, table, leaf in one.places:
        table[leaf] = new  # setattr refuses some
