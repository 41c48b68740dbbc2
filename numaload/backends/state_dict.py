"""``load_state_dict``: a torch module's parameters from a file, in parallel and in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from numaload.backends.state_names import COMPUTED, NameMap, Share, shares_of, whole
from numaload.dequantize import DTYPES
from numaload.dtypes import KERNEL_DTYPES, NAMES, dtype_name, kernel_dtype
from numaload.errors import StateDictError, UsageError, printable
from numaload.files.reader import Progress
from numaload.machine import memory
from numaload.pipeline import Target, fill
from numaload.torch_memory import (
    array_of,
    checked_device,
    empty,
    import_torch,
    new,
    torch_dtype,
    torch_type,
    unfit,
)
from numaload.weights import Tensor, Weights


class _Found(NamedTuple):
    """Hold a share whose tensor is in the file."""

    share: Share
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.share.expert is None else self.tensor.shape[1:]


class _Place(NamedTuple):
    """Where a part of the module holds a tensor: ``table`` is its _parameters or _buffers."""

    part: Any  # a torch module
    table: dict[str, Any]
    leaf: str


@dataclass
class _Parameter:
    """A parameter or persistent buffer, under all names that it has: tied ones have several."""

    names: list[str]
    old: Any  # torch's
    dtype: Any
    device: Any
    found: list[_Found] = field(default_factory=list)
    new: Any = None

    @property
    def in_place(self) -> bool:
        """Return whether it can be filled in the memory that it has."""
        old = self.old
        return self.same and old.device.type == "cpu" and old.is_contiguous()

    @property
    def same(self) -> bool:
        """Return whether the module keeps its own tensor: dtype and device stay."""
        old = self.old
        return (old.dtype, old.device) == (self.dtype, self.device) and old.device.type != "meta"


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

    name_map: {module key: tensor name} or a function from one to the other. By default the names
    of the file where it has the module's, or those of transformers' models of the architectures
    llama, qwen2, qwen2moe, qwen3, qwen3moe and deepseek2, experts and attention heads rearranged.
    dtype: of floating-point parameters and buffers; by default what they have. Those that
    transformers keeps in float32 stay in it.
    device: by default where they are, and the CPU for those on the meta device, which get new
    memory, in huge pages. Parameters whose dtype and device stay are filled in place; all tensors
    of a file are read in its order, and nothing is held twice.
    strict, missing and unexpected keys, sizes: as in ``torch.nn.Module.load_state_dict``; of tied
    parameters one name is enough. progress(bytes of the files done, in all): False cancels.
    Nothing is left on the meta device: buffers that no file holds are computed by transformers'
    models, in parts that hold no parameters; where that cannot be it is a StateDictError.
    Raises: StateDictError (a RuntimeError), NodeMemoryError, UsageError, UnsupportedTypeError,
    UnknownQuantTypeError before anything is touched; ReadError, FileChangedError, CancelledError:
    then parameters that are filled in place may be partly new, and no others have changed.
    """
    torch = import_torch()
    device = None if device is None else checked_device(device)
    plan = _Plan(module, weights, name_map)
    plan.check(strict=strict)
    parameters = [one for one in plan.parameters(dtype, device) if one.found]
    plan.check_places(parameters)
    for parameter in parameters:
        for found in parameter.found:
            _check_type(found.tensor, dtype_name(parameter.dtype))
    _check_room(parameters)
    with torch.no_grad():
        computed = _computed_buffers(plan, device)
        plan.check_meta(computed)
        _Filling(parameters, progress).run()
        for parameter in parameters:
            if not parameter.same:
                _assign(plan.places[id(parameter.old)], parameter)
        for one, values in computed.items():
            for place in plan.places[one]:
                place.table[place.leaf] = values
    return torch.nn.modules.module._IncompatibleKeys(plan.missing, plan.unexpected)  # noqa: SLF001


class _Plan:
    """Decide which tensors go where, before anything is touched."""

    def __init__(self, module: Any, weights: Weights, name_map: NameMap | None) -> None:
        self.module, self.weights = module, weights
        self.tied: dict[int, list[str]] = {}  # by id
        self.tensors: dict[int, Any] = {}
        self.missing: list[str] = []
        if not (name_map is None or callable(name_map) or hasattr(name_map, "get")):
            raise UsageError(f"name_map: expected a dict or a function, found {name_map!r}")
        for name, tensor in module.state_dict(keep_vars=True).items():
            if hasattr(tensor, "data_ptr"):
                self.tied.setdefault(id(tensor), []).append(name)
                self.tensors[id(tensor)] = tensor
            else:  # the extra state of a module, which is no tensor
                self.missing.append(name)
        self.places = _places(module)
        keys = {name: self.tensors[one] for one, names in self.tied.items() for name in names}
        shares = shares_of(weights, keys, name_map)
        self.found = {one: self._find(shares, one) for one in self.tied}
        tensors = [f.tensor for founds in self.found.values() for f in founds]
        used = {name for tensor in tensors for name in (tensor.name, *tensor.scale_names)}
        self.unexpected = [n for n in weights if n not in used and not COMPUTED.fullmatch(n)]

    def _find(self, shares: Any, one: int) -> list[_Found]:
        """Return the shares of the first tied name whose tensors are all in the file."""
        for name in self.tied[one]:
            wanted = shares(name, self.tensors[one])
            for share in wanted:
                if not isinstance(share.name, str):
                    raise UsageError(
                        f"name_map: expected a tensor's name or None for {name!r},"
                        f" found {share.name!r}"
                    )
            if wanted and all(share.name in self.weights for share in wanted):
                return [
                    _Found(share, _as_wanted(self.weights[share.name], self.tensors[one]))
                    for share in wanted
                ]
        self.missing.extend(self.tied[one])
        return []

    def check(self, *, strict: bool) -> None:
        """Check keys. Raises: StateDictError, in the words of torch."""
        errors = list(self._mismatches())
        if strict and self.unexpected:
            errors.insert(0, f"Unexpected key(s) in state_dict: {_quoted(self.unexpected)}. ")
        if strict and self.missing:
            errors.insert(0, f"Missing key(s) in state_dict: {_quoted(self.missing)}. ")
        if errors:
            kind, path = type(self.module).__name__, printable(self.weights.paths[0])
            lines = "".join(f"\n\t{error}" for error in errors)
            raise StateDictError(
                f"Error(s) in loading state_dict for {kind} from {path}:{lines}",
                missing=self.missing,
                unexpected=self.unexpected,
            )

    def check_places(self, parameters: list[_Parameter]) -> None:
        """Check places. Raises: StateDictError for new values that the module would not have."""
        lost = [one for one in parameters if id(one.old) not in self.places]
        again = self.module.state_dict(keep_vars=True) if lost else {}
        names = [
            one.names[0]
            for one in lost  # a copy is at another address each time
            if not one.same or again[one.names[0]].data_ptr() != one.old.data_ptr()
        ]
        if names:
            raise StateDictError(
                f"{type(self.module).__name__} from {printable(self.weights.paths[0])}:"
                f" {_quoted(names)} of state_dict() cannot be put into the module: no part of it"
                " has them as parameters or buffers that can be replaced. Nothing was loaded: load"
                " into the module before it is wrapped or scripted, without dtype= and device="
            )

    def check_meta(self, computed: Mapping[int, Any]) -> None:
        """Check the meta device. Raises: StateDictError for what would still be on it."""
        module = self.module
        named = [(name, self.tensors[one]) for one, names in self.tied.items() for name in names]
        for every in (module.named_parameters, module.named_buffers):
            # state_dict() need not show all of them.
            hidden = every(remove_duplicate=False)
            named += [(name, tensor) for name, tensor in hidden if id(tensor) not in self.tied]
        left = [
            name
            for name, tensor in named
            if tensor.device.type == "meta"
            and not self.found.get(id(tensor))
            and id(tensor) not in computed
        ]
        if left:
            raise StateDictError(
                f"{type(self.module).__name__} from {self.weights.paths[0]}: {_quoted(left)} would"
                " be left on the meta device: the file does not hold them, and nothing computes"
                " them without touching parameters. Nothing was loaded: make the module in memory,"
                " or with only its parameters on meta, as accelerate.init_empty_weights()"
                " does; or have transformers' from_pretrained load it",
                missing=left,
            )

    def _mismatches(self) -> Iterator[str]:
        for one, founds in self.found.items():
            problem = unfit(self.tensors[one]) if founds else ""
            if problem:
                yield printable(f"{self.tied[one][0]} cannot be filled: {problem}.")
                continue
            for found in founds:
                problem = _mismatch(found, self.tensors[one])
                if problem:
                    yield printable(f"size mismatch for {self.tied[one][0]}: {problem}.")

    def parameters(self, dtype: Any, device: Any) -> list[_Parameter]:
        return [
            _Parameter(
                names,
                self.tensors[one],
                self._dtype(names[0], self.tensors[one], dtype),
                _device(self.tensors[one], device),
                self.found[one],
            )
            for one, names in self.tied.items()
        ]

    def _dtype(self, name: str, tensor: Any, dtype: Any) -> Any:
        if dtype is None or not tensor.dtype.is_floating_point:
            return tensor.dtype
        wanted = torch_dtype(dtype_name(dtype), name)
        if not wanted.is_floating_point:
            raise UsageError(f"dtype {dtype}: expected a floating-point dtype")
        kept = getattr(self.module, "_keep_in_fp32_modules_strict", None) or ()
        if any(re.search(rf"(^|\.){re.escape(one)}(\.|$)", name) for one in kept):
            return torch_dtype("float32", name)
        return wanted


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{printable(name)}"' for name in names)


def _device(tensor: Any, device: Any) -> Any:
    if device is not None:
        return device
    return import_torch().device("cpu") if tensor.device.type == "meta" else tensor.device


def _mismatch(found: _Found, parameter: Any) -> str:
    """Say why the tensor does not fit, or "". Dims of 1 make no difference: GGUF drops some."""
    expert, shape = found.share.expert, found.tensor.shape
    if expert is not None and (len(shape) != 3 or expert >= shape[0]):
        return f"expert {expert} is not in a tensor of shape {shape}"
    try:
        place = found.share.view(parameter)
    except (RuntimeError, IndexError) as error:  # of torch: the sizes do not divide so
        return f"{tuple(parameter.shape)} cannot be made of a tensor of shape {shape}: {error}"
    rearranged = found.share.view is not whole and place.numel() == prod(found.shape)
    if _squeezed(place.shape) == _squeezed(found.shape) or (
        rearranged and place.shape[-1:] == found.shape[-1:]
    ):
        return ""
    return (
        f"copying a param with shape {list(found.shape)} from checkpoint, the shape in current"
        f" model is {list(parameter.shape)}"
    )


def _squeezed(shape: Any) -> list[int]:
    return [dim for dim in shape if dim != 1]


def _as_wanted(tensor: Tensor, parameter: Any) -> Tensor:
    """Return the weights for floats, what is stored for modules that are quantized themselves."""
    floats = parameter.dtype.is_floating_point and parameter.dtype.itemsize > 1
    return tensor if floats else tensor.as_stored()


def _check_type(tensor: Tensor, dtype: str) -> None:
    """Check the type. Raises: UnknownQuantTypeError, UnsupportedTypeError."""
    tensor.check_type()
    if tensor.has_kernel:
        tensor.conversion(DTYPES[kernel_dtype(dtype)])
    else:
        tensor.check_scales(dtype)
        tensor.check_native()
        torch_type(tensor.type_name)


def _check_room(parameters: list[_Parameter]) -> None:
    """Check that memory has room: else Linux kills a process later. Raises: NodeMemoryError."""
    new = [one for one in parameters if not one.in_place and one.device.type == "cpu"]
    nbytes = sum(one.old.numel() * one.dtype.itemsize for one in new)
    if nbytes:
        memory.require(nbytes, "the new parameters", "nothing was loaded: free memory")


class _Filling:
    """Fill in two steps: first, in parallel and in file order, what kernels or reading put straight
    into place; then, one by one, what torch converts or moves to another device.
    """

    def __init__(self, parameters: list[_Parameter], progress: Progress | None) -> None:
        self.parameters, self.progress = parameters, progress
        shares = [found for one in parameters for found in one.found]
        self.total, self.before = sum(map(_nbytes, shares)), 0

    def run(self) -> None:
        targets: list[Target] = []
        staged: list[_Parameter] = []
        for one in self.parameters:
            if one.device.type == "cpu" and (one.in_place or not one.same) and _direct(one):
                one.new = one.old if one.in_place else empty(one.old.shape, one.dtype)
                targets.extend(_targets(one))
            else:
                staged.append(one)
        self._fill(sorted(targets, key=lambda target: target.order))
        for one in staged:
            self._stage(one)

    def _stage(self, one: _Parameter) -> None:
        torch = import_torch()
        one.new = one.old
        if not one.same:
            one.new = torch.empty(one.old.shape, dtype=one.dtype, device=one.device)
        for found in one.found:
            place = found.share.view(one.new)
            made = self._made(found, dtype_name(one.dtype))
            # Only within inference_mode may its tensors be written to; without, it turns grad on.
            with torch.inference_mode(one.new.is_inference()), torch.no_grad():
                place.copy_(made.reshape(place.shape))

    def _made(self, found: _Found, wanted: str) -> Any:
        """Make a CPU tensor of the share, by kernels where they can, else as in the file."""
        tensor = found.tensor
        if tensor.has_kernel:
            made = new(found.shape, torch_dtype(kernel_dtype(wanted), tensor.name), tensor.name)
        else:
            tensor.check_native()
            made = new(found.shape, torch_type(tensor.type_name), tensor.name)
        self._fill([_target(found, made)])
        return made

    def _fill(self, targets: list[Target]) -> None:
        before, total, progress = self.before, self.total, self.progress

        def report(done: int, _: int) -> Any:
            return progress(before + done, total) if progress else None

        fill(targets, progress=report if progress else None)
        self.before += sum(target.nbytes for target in targets)


def _nbytes(found: _Found) -> int:
    experts = 1 if found.share.expert is None else found.tensor.shape[0]
    return int(found.tensor.nbytes // experts)


def _direct(one: _Parameter) -> bool:
    """Return whether kernels or reading make exactly what is wanted, without torch."""
    name = dtype_name(one.dtype)
    return all(
        (found.tensor.has_kernel and name in KERNEL_DTYPES) or _as_it_is(found.tensor, name)
        for found in one.found
    )


def _as_it_is(tensor: Tensor, dtype: str) -> bool:
    plain = not tensor.in_blocks and tensor.byte_order == "little"
    return plain and NAMES.get(tensor.type_name) == dtype and dtype != "float4_e2m1fn_x2"


def _targets(one: _Parameter) -> Iterator[Target]:
    for found in one.found:
        yield _target(found, found.share.view(one.new))


def _target(found: _Found, place: Any) -> Target:
    tensor, name = found.tensor, dtype_name(place.dtype)
    raw = _as_it_is(tensor, name) or not tensor.has_kernel
    first = 0 if found.share.expert is None else found.share.expert * _size(found)
    return Target(tensor, array_of(place), None if raw else name, first)


def _size(found: _Found) -> int:
    return int(found.tensor.size // found.tensor.shape[0])


def _assign(places: list[_Place], parameter: _Parameter) -> None:
    """Put the new tensor wherever the module holds the old one."""
    torch = import_torch()
    old, new = parameter.old, parameter.new
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
    for place in places:
        place.table[place.leaf] = new  # setattr refuses some


def _places(module: Any) -> dict[int, list[_Place]]:
    """Map the id of every tensor to where it is held: keys of state_dict() need be no paths."""
    found: dict[int, list[_Place]] = {}
    for _, part in module.named_modules():
        for table in (part._parameters, part._buffers):  # noqa: SLF001
            if isinstance(table, dict):  # those of torch.jit refuse other dtypes
                held = [(leaf, tensor) for leaf, tensor in table.items() if tensor is not None]
                for leaf, tensor in held:
                    found.setdefault(id(tensor), []).append(_Place(part, table, leaf))
    return found


def _unfilled(plan: _Plan) -> Iterator[tuple[int, _Place]]:
    """Yield each buffer on the meta device that state_dict() does not have, by its id."""
    for one, places in plan.places.items():
        for place in places:
            unsaved = place.leaf in place.part._non_persistent_buffers_set  # noqa: SLF001
            on_meta = place.table[place.leaf].device.type == "meta"
            if unsaved and on_meta and one not in plan.tied:
                yield one, place


def _computed_buffers(plan: _Plan, device: Any) -> dict[int, Any]:
    """Compute the buffers that ``_unfilled`` yields: {id: values}; the module stays as it is.

    Models of transformers can compute theirs again (rotary embeddings). They do it by initializing
    the part, with whatever is in it: so only where nothing of that comes from a file.
    """
    found: dict[int, Any] = {}
    parts: dict[Any, list[tuple[int, str]]] = {}
    for one, place in _unfilled(plan):
        parts.setdefault(place.part, []).append((one, place.leaf))
    for part, leaves in parts.items():
        if not hasattr(plan.module, "_init_weights") or part.state_dict():
            continue
        if next(part.parameters(), None) is not None:  # that state_dict() does not show
            continue
        once, again = (
            _computed(plan.module, part, leaves, device or "cpu", fill_with) for fill_with in (0, 1)
        )
        for one, leaf in leaves:
            if once[leaf].equal(again[leaf]):  # and not what it was filled with before
                found.setdefault(one, once[leaf])
    return found


def _computed(
    module: Any, part: Any, leaves: list[tuple[int, str]], device: Any, fill_with: int
) -> dict[str, Any]:
    """Return the part's buffers after it was initialized with copies of the other ones."""
    torch = import_torch()
    before = [(one._buffers, dict(one._buffers)) for one in part.modules()]  # noqa: SLF001
    made: dict[int, Any] = {}
    try:
        for buffers, old in before:
            for leaf, tensor in old.items():
                buffers[leaf] = None if tensor is None else tensor.clone()
        for one, leaf in leaves:
            old_one = before[0][1][leaf]
            if one not in made:
                made[one] = torch.full(old_one.shape, fill_with, dtype=old_one.dtype, device=device)
            part._buffers[leaf] = made[one]  # noqa: SLF001
        module._init_weights(part)  # noqa: SLF001 - where transformers computes them
        return dict(part._buffers)  # noqa: SLF001
    finally:
        for buffers, old in before:
            buffers.clear()
            buffers.update(old)
