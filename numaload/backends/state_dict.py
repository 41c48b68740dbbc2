"""``load_state_dict``: a torch module's parameters from a file, in parallel and in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from numaload.backends.state_names import COMPUTED, NameMap, Share, shares_of, whole
from numaload.dequantize import DTYPES, Conversion
from numaload.dtypes import KERNEL_DTYPES, NAMES, dtype_name, kernel_dtype
from numaload.errors import StateDictError, UsageError, printable
from numaload.numa import memory
from numaload.pipeline import Target, fill
from numaload.storage.reader import Progress
from numaload.torch_memory import array_of, empty, import_torch, new, torch_dtype, torch_type
from numaload.weights import Tensor, Weights


class Found(NamedTuple):
    """A share whose tensor is in the file."""

    share: Share
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.share.expert is None else self.tensor.shape[1:]


@dataclass
class Parameter:
    """A parameter or persistent buffer, under all names that it has: tied ones have several."""

    names: list[str]
    old: Any  # torch's
    dtype: Any
    device: Any
    found: list[Found] = field(default_factory=list)
    new: Any = None

    @property
    def in_place(self) -> bool:
        """Whether it can be filled where it is."""
        old = self.old
        return self.same and old.device.type == "cpu" and old.is_contiguous()

    @property
    def same(self) -> bool:
        """Whether the module keeps its tensor, however it is filled."""
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
    """Fill a torch module from a GGUF or safetensors model; what torch's own returns.

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
    plan = _Plan(module, weights, name_map)
    plan.check(strict=strict)
    parameters = [one for one in plan.parameters(dtype, device) if one.found]
    for parameter in parameters:
        for found in parameter.found:
            _check_type(found.tensor, dtype_name(parameter.dtype))
    _check_room(parameters)
    with torch.no_grad():
        computed = _computed_buffers(module, device)
        plan.check_meta(computed)
        _Filling(parameters, progress).run()
        for parameter in parameters:
            if not parameter.same:
                _assign(module, parameter)
        for buffers, name, values in computed.values():
            buffers[name] = values
    return torch.nn.modules.module._IncompatibleKeys(plan.missing, plan.unexpected)  # noqa: SLF001


class _Plan:
    """Which tensors go where, before anything is touched."""

    def __init__(self, module: Any, weights: Weights, name_map: NameMap | None) -> None:
        self.module, self.weights = module, weights
        self.tied: dict[int, list[str]] = {}  # by id
        self.tensors: dict[int, Any] = {}
        self.missing: list[str] = []
        for name, tensor in module.state_dict(keep_vars=True).items():
            if hasattr(tensor, "data_ptr"):
                self.tied.setdefault(id(tensor), []).append(name)
                self.tensors[id(tensor)] = tensor
            else:  # the extra state of a module, which is no tensor
                self.missing.append(name)
        keys = {name: self.tensors[one] for one, names in self.tied.items() for name in names}
        shares = shares_of(weights, keys, name_map)
        self.found = {one: self._find(shares, one) for one in self.tied}
        used = {f.tensor.name for founds in self.found.values() for f in founds}
        self.unexpected = [n for n in weights if n not in used and not COMPUTED.fullmatch(n)]

    def _find(self, shares: Any, one: int) -> list[Found]:
        """Of the first name whose tensors are all there."""
        for name in self.tied[one]:
            wanted = shares(name, self.tensors[one])
            if wanted and all(share.name in self.weights for share in wanted):
                return [Found(share, self.weights[share.name]) for share in wanted]
        self.missing.extend(self.tied[one])
        return []

    def check(self, *, strict: bool) -> None:
        """Raises: StateDictError, in the words of torch."""
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

    def check_meta(self, computed: Mapping[str, Any]) -> None:
        """Raises: StateDictError for what would be on the meta device still."""
        left = [
            name
            for one, founds in self.found.items()
            if not founds and self.tensors[one].device.type == "meta"
            for name in self.tied[one]
        ]
        left += [name for name, _, _ in _unfilled(self.module) if name not in computed]
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
            for found in founds:
                problem = _mismatch(found, self.tensors[one])
                if problem:
                    yield printable(f"size mismatch for {self.tied[one][0]}: {problem}.")

    def parameters(self, dtype: Any, device: Any) -> list[Parameter]:
        return [
            Parameter(
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
            raise UsageError(f"dtype {dtype}: expected a floating-point one")
        kept = getattr(self.module, "_keep_in_fp32_modules_strict", None) or ()
        if any(re.search(rf"(^|\.){re.escape(one)}(\.|$)", name) for one in kept):
            return torch_dtype("float32", name)
        return wanted


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{printable(name)}"' for name in names)


def _device(tensor: Any, device: Any) -> Any:
    torch = import_torch()
    if device is not None:
        return torch.empty(0, device=device).device  # with an index: "cuda" is "cuda:0"
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _mismatch(found: Found, parameter: Any) -> str:
    """Empty where the tensor fits; dims of 1 make no difference: GGUF drops some."""
    expert, shape = found.share.expert, found.tensor.shape
    if expert is not None and (len(shape) != 3 or expert >= shape[0]):
        return f"expert {expert} of a tensor of shape {shape}"
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


def _check_type(tensor: Tensor, dtype: str) -> None:
    """Raises: UnknownQuantTypeError, UnsupportedTypeError for what cannot be converted."""
    tensor.check_type()
    if tensor.has_kernel:
        wanted = DTYPES[kernel_dtype(dtype)]
        Conversion(tensor.qtype, wanted, name=tensor.name, byte_order=tensor.byte_order)
    else:
        tensor.check_native()
        torch_type(tensor.type_name)


def _check_room(parameters: list[Parameter]) -> None:
    """Raises: NodeMemoryError rather than have the kernel kill someone later."""
    new = [one for one in parameters if not one.in_place and one.device.type == "cpu"]
    nbytes = sum(one.old.numel() * one.dtype.itemsize for one in new)
    if nbytes:
        memory.require(nbytes, "the new parameters", "nothing was loaded: free memory")


class _Filling:
    """First all that is filled where it stays, in the order of the files; then what is converted
    by torch or goes to another device, one after another.
    """

    def __init__(self, parameters: list[Parameter], progress: Progress | None) -> None:
        self.parameters, self.progress = parameters, progress
        shares = [found for one in parameters for found in one.found]
        self.total, self.before = sum(map(_nbytes, shares)), 0

    def run(self) -> None:
        targets: list[Target] = []
        staged: list[Parameter] = []
        for one in self.parameters:
            if one.device.type == "cpu" and (one.in_place or not one.same) and _direct(one):
                one.new = one.old if one.in_place else empty(one.old.shape, one.dtype)
                targets.extend(_targets(one))
            else:
                staged.append(one)
        self._fill(sorted(targets, key=lambda target: target.order))
        for one in staged:
            self._stage(one)

    def _stage(self, one: Parameter) -> None:
        torch = import_torch()
        one.new = one.old
        if not one.same:
            one.new = torch.empty(one.old.shape, dtype=one.dtype, device=one.device)
        for found in one.found:
            place = found.share.view(one.new)
            made = self._made(found, dtype_name(one.dtype))
            place.copy_(made.reshape(place.shape))

    def _made(self, found: Found, wanted: str) -> Any:
        """A CPU tensor of the share, by kernels where they can, else as in the file."""
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


def _nbytes(found: Found) -> int:
    experts = 1 if found.share.expert is None else found.tensor.shape[0]
    return int(found.tensor.nbytes // experts)


def _direct(one: Parameter) -> bool:
    """Whether kernels or reading make exactly what is wanted, without torch."""
    name = dtype_name(one.dtype)
    return all(
        (found.tensor.has_kernel and name in KERNEL_DTYPES) or _as_it_is(found.tensor, name)
        for found in one.found
    )


def _as_it_is(tensor: Tensor, dtype: str) -> bool:
    plain = not tensor.in_blocks and tensor.byte_order == "little"
    return plain and NAMES.get(tensor.type_name) == dtype and dtype != "float4_e2m1fn_x2"


def _targets(one: Parameter) -> Iterator[Target]:
    for found in one.found:
        yield _target(found, found.share.view(one.new))


def _target(found: Found, place: Any) -> Target:
    tensor, name = found.tensor, dtype_name(place.dtype)
    raw = _as_it_is(tensor, name) or not tensor.has_kernel
    first = 0 if found.share.expert is None else found.share.expert * _size(found)
    return Target(tensor, array_of(place), None if raw else name, first)


def _size(found: Found) -> int:
    return int(found.tensor.size // found.tensor.shape[0])


def _assign(module: Any, parameter: Parameter) -> None:
    """Put the new tensor into the module under all its names."""
    torch = import_torch()
    old, new = parameter.old, parameter.new
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
    for name in parameter.names:
        path, _, leaf = name.rpartition(".")
        holder = module.get_submodule(path)
        kind: Mapping[str, Any] = holder._parameters  # noqa: SLF001 - setattr refuses some
        table = kind if leaf in kind else holder._buffers  # noqa: SLF001
        table[leaf] = new  # type: ignore[index]


def _unfilled(module: Any) -> Iterator[tuple[str, Any, str]]:
    """(full name, part, its name there) of each buffer on the meta device that no file holds."""
    for path, part in module.named_modules():
        unsaved = part._non_persistent_buffers_set  # noqa: SLF001
        for name, buffer in part.named_buffers(recurse=False):
            if name in unsaved and buffer.device.type == "meta":
                yield f"{path}.{name}".lstrip("."), part, name


def _computed_buffers(module: Any, device: Any) -> dict[str, tuple[dict[str, Any], str, Any]]:
    """{full name: (buffers of its part, name there, values)}; the module stays as it is.

    Models of transformers can compute theirs again (rotary embeddings). They do it by initializing
    the part, with whatever is in it: so only where nothing of that comes from a file.
    """
    found: dict[str, tuple[dict[str, Any], str, Any]] = {}
    parts: dict[Any, list[tuple[str, str]]] = {}
    for full, part, name in _unfilled(module):
        parts.setdefault(part, []).append((full, name))
    for part, names in parts.items():
        if not hasattr(module, "_init_weights") or part.state_dict():
            continue
        once, again = (_computed(module, part, names, device or "cpu", fill) for fill in (0, 1))
        for full, name in names:
            if once[name].equal(again[name]):  # and not what it was filled with before
                found[full] = (part._buffers, name, once[name])  # noqa: SLF001
    return found


def _computed(
    module: Any, part: Any, names: list[tuple[str, str]], device: Any, fill_with: int
) -> dict[str, Any]:
    torch, before = import_torch(), dict(part._buffers)  # noqa: SLF001
    try:
        for _, name in names:
            old = before[name]
            part._buffers[name] = torch.full(  # noqa: SLF001
                old.shape, fill_with, dtype=old.dtype, device=device
            )
        module._init_weights(part)  # noqa: SLF001 - where transformers computes them
        return dict(part._buffers)  # noqa: SLF001
    finally:
        part._buffers.update(before)  # noqa: SLF001
