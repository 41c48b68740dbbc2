"""Many small tensors at once: one piece of memory in huge pages, read by all threads.

An adapter has hundreds of tensors of some hundred KiB. Each by itself costs more in allocations,
page faults and tasks than in bytes, so those that stay as they are in the file are read as one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from numaload.dtypes import ITEMS, NAMES, dtype_name, kernel_dtype
from numaload.errors import UnsupportedTypeError
from numaload.files.reader import Progress
from numaload.formats.safetensors import SafeTensorInfo
from numaload.machine import memory
from numaload.pipeline import Target, fill
from numaload.torch_memory import array_of, empty, import_torch, torch_dtype
from numaload.weights import Tensor, Weights

ALIGNMENT = 64  # bytes, as torch's own
MOST_BETWEEN = 4096  # bytes that are read for nothing rather than begin anew


class Load(NamedTuple):
    """A tensor of the result.

    shape: of the result, if it is not the tensor's. view: of the result, its elements in the order
    of the file's, if they are not in the same.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...] | None = None
    view: Callable[[Any], Any] | None = None


class _Plan(NamedTuple):
    """Say how a Load is made. dtype: the result's, before torch may convert it."""

    load: Load
    dtype: str
    raw: bool  # whether it has that in the file
    itemsize: int

    @property
    def nbytes(self) -> int:
        return self.load.tensor.size * self.itemsize

    @property
    def straight(self) -> bool:
        """Return whether the result has the very bytes of the file."""
        return self.raw and self.load.view is None and self.load.tensor.offset % self.itemsize == 0


def load_all(
    weights: Weights, loads: Sequence[Load], dtype: Any, progress: Progress | None, *, copy: bool
) -> dict[str, Any]:
    """Load tensors into one piece of memory; return {name: torch tensor}.

    dtype: torch's, or None for the file's, which is float32 for quantized blocks.
    copy False: what stays as it is in the file is mapped from there instead, read-only.
    Raises: UnsupportedTypeError, NodeMemoryError before anything is read; as ``fill``.
    """
    plans = sorted((_plan(load, dtype) for load in loads), key=_order)
    mapped = [] if copy else [plan for plan in plans if plan.raw and plan.load.view is None]
    made = {plan.load.name: plan.load.tensor.torch() for plan in mapped}
    plans = [plan for plan in plans if plan.load.name not in made]
    runs = list(_runs([plan for plan in plans if plan.straight]))
    alone = [plan for plan in plans if not plan.straight]
    placed, total = _placed(runs, alone)
    what = f"{weights.paths[0]}: its tensors"
    memory.require(total, what, "nothing was loaded: free memory, or a smaller dtype")
    flat = empty((total,), import_torch().uint8).numpy()
    made |= {plan.load.name: _result(plan, flat, placed[plan.load.name]) for plan in plans}
    targets = [_run_target(weights, run, flat, placed[run[0].load.name]) for run in runs]
    targets += [_target(plan, made[plan.load.name]) for plan in alone]
    fill(sorted(targets, key=lambda target: target.order), progress=progress)
    return {load.name: _converted(made[load.name], dtype) for load in loads}


def _order(plan: _Plan) -> tuple[int, int]:
    return plan.load.tensor.place_in_files


def _plan(load: Load, dtype: Any) -> _Plan:
    tensor = load.tensor
    tensor.check_type()
    own = NAMES.get(tensor.type_name, "float32")
    made = own if dtype is None else dtype_name(dtype)
    if not tensor.has_kernel:
        tensor.check_native()
        made = own
    else:
        made = kernel_dtype(made)
    if tensor.type_name in ITEMS:
        raise UnsupportedTypeError(
            f"tensor {tensor.name!r}: adapters of {tensor.type_name} cannot be loaded"
        )
    raw = not tensor.in_blocks and own == made and tensor.byte_order == "little"
    return _Plan(load, made, raw, torch_dtype(made, tensor.name).itemsize)


def _runs(plans: Iterable[_Plan]) -> Iterator[list[_Plan]]:
    """Group plans, given in the order of the files, into runs that lie together."""
    run: list[_Plan] = []
    for plan in plans:
        if run and not 0 <= _gap(run[-1], plan) <= MOST_BETWEEN:
            yield run
            run = []
        run.append(plan)
    if run:
        yield run


def _gap(before: _Plan, after: _Plan) -> int:
    (part, start), (other, offset) = _order(before), _order(after)
    return offset - start - before.nbytes if part == other else -1


def _placed(runs: Sequence[Sequence[_Plan]], alone: Sequence[_Plan]) -> tuple[dict[str, int], int]:
    """Return {name: where it begins in memory}, and the bytes of them all."""
    placed: dict[str, int] = {}
    end = 0
    for run in [*runs, *([plan] for plan in alone)]:
        first = run[0].load.tensor.offset
        # As far from a multiple of the alignment as in the file, whose writers align for a reason.
        start = -(-end // ALIGNMENT) * ALIGNMENT + first % ALIGNMENT * run[0].straight
        placed |= {plan.load.name: start + plan.load.tensor.offset - first for plan in run}
        end = placed[run[-1].load.name] + run[-1].nbytes
    return placed, end


def _result(plan: _Plan, flat: Any, at: int) -> Any:
    """Make a tensor with a storage of its own, so that saving it does not save all the others."""
    torch, load = import_torch(), plan.load
    own = torch.from_numpy(flat[at : at + plan.nbytes])
    return own.view(torch_dtype(plan.dtype, load.name)).reshape(load.shape or load.tensor.shape)


def _run_target(weights: Weights, run: Sequence[_Plan], flat: Any, start: int) -> Target:
    """Return one target of bytes that covers a run of tensors."""
    part, first = _order(run[0])
    nbytes = _order(run[-1])[1] + run[-1].nbytes - first
    info = SafeTensorInfo(f"{run[0].load.tensor.name} and more", (nbytes,), "U8", first, nbytes)
    return Target(Tensor(info, weights, part), flat[start : start + nbytes], None)


def _target(plan: _Plan, result: Any) -> Target:
    view = plan.load.view
    place = array_of(result if view is None else view(result))
    return Target(plan.load.tensor, place, None if plan.raw else plan.dtype)


def _converted(result: Any, dtype: Any) -> Any:
    return result if dtype is None else result.to(dtype)
