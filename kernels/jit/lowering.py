"""The vocabulary of `lanes.py` as LLVM instructions. Importing it registers them with numba."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model, types

from numaload.kernels import lanes
from numaload.kernels.jit.target import target
from numaload.kernels.lanes import CHUNK, LANES, LINE


class Lanes(types.Type):
    """16 or 32 values of ``dtype`` in a vector register, or in several."""

    def __init__(self, dtype: Any, count: int = LANES) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"lanes({dtype}, {count})")


U8, I8, U16, F32 = (Lanes(t) for t in (types.uint8, types.int8, types.uint16, types.float32))
BIT, I16, I32, I64 = (ir.IntType(n) for n in (1, 16, 32, 64))
ELEMENTS = {"uint8": ir.IntType(8), "int8": ir.IntType(8), "uint16": I16}


def _element(kind: Lanes) -> ir.Type:
    return ELEMENTS.get(str(kind.dtype), ir.FloatType())


def vector(of: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(of, count)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, vector(_element(kind), kind.count))


# (builder, signature, *LLVM values) -> LLVM value, or None for a function that returns nothing
Build = Callable[..., Any]


def lowers(function: Callable[..., Any], *takes: Any, gives: Any) -> Callable[[Build], Build]:
    """Compile calls of ``function`` with ``takes`` as the instructions that the build emits.

    gives: the type of its result, or a function from the types of the arguments to it; None where
    they do not fit, which is an error of numba's when compiling.
    """

    def register(build: Build) -> Build:
        @infer_global(function)
        class Template(AbstractTemplate):
            def generic(self, kinds: Any, keywords: Any) -> Any:
                if keywords or len(kinds) != len(takes):
                    return None
                result = gives if isinstance(gives, types.Type) else gives(*kinds)
                return None if result is None else signature(result, *kinds)

        @lower_builtin(function, *takes)
        def _lowered(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            places = [
                _pointer(context, builder, *one) for one in zip(sig.args, values, strict=True)
            ]
            result = build(builder, sig, *places)
            return context.get_dummy_value() if result is None else result

        return build

    return register


def _pointer(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return the address of a constant array's items; anything else as it is."""
    is_array = isinstance(kind, types.Array)
    return context.make_array(kind)(context, builder, value).data if is_array else value


def constant(of: ir.Type, values: Any) -> ir.Constant:
    """Return lanes with the same number in each, or a number for each."""
    numbers = list(values) if hasattr(values, "__iter__") else [values] * LANES
    return ir.Constant(vector(of), numbers)


def splat(builder: Any, value: Any) -> Any:
    empty = ir.Constant(vector(value.type), ir.Undefined)
    first = builder.insert_element(empty, value, I32(0))
    return builder.shuffle_vector(first, empty, constant(I32, 0))


def _call(builder: Any, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an intrinsic of LLVM."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def place(builder: Any, base: Any, at: Any, of: ir.Type) -> Any:
    """Return a pointer to a value of type ``of`` at item ``at`` of a pointer."""
    return builder.bitcast(builder.gep(base, [at]), of.as_pointer())


# operators -------------------------------------------------------------------------------------

OPERATORS = {
    operator.and_: ("and_", None),
    operator.or_: ("or_", None),
    operator.xor: ("xor", None),
    operator.lshift: ("shl", None),
    operator.rshift: ("lshr", None),
    operator.add: ("add", "fadd"),
    operator.sub: ("sub", "fsub"),
    operator.mul: ("mul", "fmul"),
}


def _takes(kind: Lanes, other: Any) -> bool:
    """Return whether an operator takes ``other``: lanes of the same kind, or a number."""
    if kind == F32:
        return other in {F32, types.float32}
    return other == kind or isinstance(other, types.Integer)


def _operator(op: Any, integer: str, single: str | None) -> None:
    @infer_global(op)
    class Template(AbstractTemplate):
        def generic(self, kinds: Any, keywords: Any) -> Any:
            kind, other = (*kinds, None)[:2]
            if keywords or not isinstance(kind, Lanes) or not _takes(kind, other):
                return None
            return signature(kind, *kinds) if single or kind != F32 else None

    @lower_builtin(op, Lanes, types.Any)
    def _lowered(_context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind, (left, right) = sig.args[0], values
        if not isinstance(sig.args[1], Lanes):
            # A number's lower bits, as integers wrap.
            right = splat(builder, right if kind == F32 else _cut(builder, right, _element(kind)))
        name = single if kind == F32 else integer
        if name == "lshr" and kind.dtype.signed:
            name = "ashr"
        return getattr(builder, str(name))(left, right)


def _cut(builder: Any, value: Any, to: Any) -> Any:
    return value if value.type.width == to.width else builder.trunc(value, to)


for _op, _names in OPERATORS.items():
    _operator(_op, *_names)


# numbers ---------------------------------------------------------------------------------------


def _number(bits: int) -> Build:
    def build(builder: Any, _sig: Any, base: Any, at: Any) -> Any:
        value = builder.load(place(builder, base, at, ir.IntType(bits)), align=1)
        return value if bits == 64 else builder.zext(value, I64)

    return build


for _function, _bits in ((lanes.u8, 8), (lanes.u16, 16), (lanes.u32, 32), (lanes.i64, 64)):
    lowers(_function, types.Any, types.Integer, gives=types.int64)(_number(_bits))


# memory ----------------------------------------------------------------------------------------

ITEMS = {kind.dtype: kind for kind in (U8, I8, U16, F32)}


def _items(base: Any, _at: Any) -> Any:
    return ITEMS[base.dtype]


@lowers(lanes.load, types.Any, types.Integer, gives=_items)
def _load(builder: Any, sig: Any, base: Any, at: Any) -> Any:
    return builder.load(place(builder, base, at, vector(_element(sig.return_type))), align=1)


lowers(lanes.load_u16, types.CPointer, types.Integer, gives=U16)(_load)
lowers(lanes.load_f32, types.CPointer, types.Integer, gives=F32)(_load)


@lowers(lanes.join, Lanes, Lanes, gives=lambda low, _high: Lanes(low.dtype, 2 * LANES))
def join(builder: Any, _sig: Any, low: Any, high: Any) -> Any:
    order = ir.Constant(vector(I32, 2 * LANES), list(range(2 * LANES)))
    return builder.shuffle_vector(low, high, order)


def _stored(dst: Any, _at: Any, kind: Any) -> Any:
    return types.none if dst.dtype == kind.dtype else None


@lowers(lanes.put, types.CPointer, types.Integer, Lanes, gives=_stored)
def _put(builder: Any, _sig: Any, base: Any, at: Any, value: Any) -> None:
    builder.store(value, place(builder, base, at, value.type), align=1)


@lowers(lanes.stream, types.CPointer, types.Integer, Lanes, gives=_stored)
def _stream(builder: Any, _sig: Any, base: Any, at: Any, value: Any) -> None:
    store = builder.store(value, place(builder, base, at, value.type), align=LINE)
    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@lowers(lanes.fence, gives=types.none)
def _fence(builder: Any, _sig: Any) -> None:
    if target().has("sse2") or target().triple.startswith("x86_64"):
        _call(builder, "llvm.x86.sse.sfence", ir.VoidType())
    else:
        builder.fence("seq_cst")


@lowers(lanes.ahead, types.CPointer, types.Integer, gives=types.int64)
def _ahead(builder: Any, sig: Any, base: Any, at: Any) -> Any:
    size = sig.args[0].dtype.bitwidth // 8
    address = builder.ptrtoint(builder.gep(base, [at]), I64)
    nbytes = builder.and_(builder.neg(address), I64(LINE - 1))
    return builder.udiv(nbytes, I64(size))


@lowers(lanes.scratch, gives=types.CPointer(types.float32))
def _scratch(builder: Any, _sig: Any) -> Any:
    with builder.goto_entry_block():
        room = builder.alloca(ir.FloatType(), CHUNK)
    room.align = LINE
    return room


# lanes -----------------------------------------------------------------------------------------


def _joined(builder: Any, values: Any, of: ir.IntType) -> Any:
    """Join the lower bits of some numbers to 16 bytes."""
    result = ir.Constant(ir.VectorType(of, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        result = builder.insert_element(result, _cut(builder, value, of), I32(i))
    return builder.bitcast(result, vector(ir.IntType(8)))


@lowers(lanes.pair, types.Integer, types.Integer, gives=U8)
def _pair(builder: Any, _sig: Any, *values: Any) -> Any:
    return _joined(builder, values, I64)


@lowers(lanes.interleave, types.Integer, types.Integer, gives=U8)
def _interleave(builder: Any, _sig: Any, *values: Any) -> Any:
    both, half = _joined(builder, values, I64), LANES // 2
    order = [i // 2 + i % 2 * half for i in range(LANES)]
    return builder.shuffle_vector(both, both, constant(I32, order))


@lowers(lanes.quad, *[types.Integer] * 4, gives=U8)
def _quad(builder: Any, _sig: Any, *values: Any) -> Any:
    return _joined(builder, values, I32)


def _mask(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.trunc(bits, ir.IntType(LANES)), vector(BIT))


@lowers(lanes.spread, types.Integer, gives=U8)
def _spread(builder: Any, _sig: Any, bits: Any) -> Any:
    return builder.sext(_mask(builder, bits), vector(ir.IntType(8)))


@lowers(lanes.pairs_of_bits, types.Integer, gives=U8)
def _pairs_of_bits(builder: Any, _sig: Any, bits: Any) -> Any:
    each = splat(builder, builder.trunc(bits, I32))
    moved = builder.lshr(each, constant(I32, range(0, 2 * LANES, 2)))
    return builder.trunc(builder.and_(moved, constant(I32, 3)), vector(ir.IntType(8)))


@lowers(lanes.plus_or_minus, types.Integer, Lanes, gives=F32)
def _plus_or_minus(builder: Any, _sig: Any, bits: Any, value: Any) -> Any:
    # Not a subtraction: that would keep the sign of a NaN.
    flipped = builder.xor(builder.bitcast(value, vector(I32)), constant(I32, 1 << 31))
    return builder.select(_mask(builder, bits), value, builder.bitcast(flipped, value.type))


@lowers(lanes.signed, Lanes, gives=I8)
def _signed(_builder: Any, _sig: Any, value: Any) -> Any:
    return value


@lowers(lanes.wide, Lanes, gives=U16)
def _wide(builder: Any, _sig: Any, value: Any) -> Any:
    return builder.zext(value, vector(I16))


@lowers(lanes.floats, Lanes, gives=F32)
def _floats(builder: Any, sig: Any, value: Any) -> Any:
    extend = builder.sext if sig.args[0].dtype.signed else builder.zext
    # Signed from 32 bits, also where it is never negative: there is an instruction for that.
    return builder.sitofp(extend(value, vector(I32)), vector(ir.FloatType()))


@lowers(lanes.lookup, types.Any, Lanes, gives=lambda table, _lanes: ITEMS[table.dtype])
def _lookup(builder: Any, _sig: Any, table: Any, index: Any) -> Any:
    kind = vector(ir.IntType(8))
    values = builder.load(place(builder, table, I64(0), kind), align=1)
    if target().has("ssse3"):
        return _call(builder, "llvm.x86.ssse3.pshuf.b.128", kind, values, index)
    if target().triple.startswith("aarch64"):
        return _call(builder, "llvm.aarch64.neon.tbl1.v16i8", kind, values, index)
    result = ir.Constant(kind, ir.Undefined)
    for i in range(LANES):
        value = builder.extract_element(values, builder.extract_element(index, I32(i)))
        result = builder.insert_element(result, value, I32(i))
    return result


def _single(kind: Any, _i: Any) -> Any:
    return types.float32 if kind == F32 else None


@lowers(lanes.lane, Lanes, types.Integer, gives=_single)
def _lane(builder: Any, _sig: Any, value: Any, i: Any) -> Any:
    return builder.extract_element(value, i)
