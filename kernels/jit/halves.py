"""Conversions of float16 and bfloat16 as LLVM instructions; `lowering.py` has the other words."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.extending import types

from numaload.kernels import lanes
from numaload.kernels.jit.lowering import (
    F32,
    I16,
    I32,
    U16,
    Lanes,
    constant,
    join,
    lowers,
    place,
    splat,
    vector,
)
from numaload.kernels.jit.target import target
from numaload.kernels.lanes import LANES

# Whoever compiles what names an instruction needs it: numba as well, before us.
llvm.initialize_native_asmparser()


def _c(value: int) -> ir.Constant:
    """Return the same 32 bits in each lane."""
    return constant(I32, value)


def _has_half_conversions() -> bool:
    return target().has("f16c") or target().triple.startswith("aarch64")


def _add_floats(builder: Any, left: Any, right: Any) -> Any:
    """Add floats that are given as bits; return bits."""
    single = vector(ir.FloatType())
    total = builder.fadd(builder.bitcast(left, single), builder.bitcast(right, single))
    return builder.bitcast(total, left.type)


def _widen_half(builder: Any, half: Any) -> Any:
    """Convert 16 float16 from their bits to float32; a NaN becomes quiet."""
    b, single = builder, vector(ir.FloatType())
    if _has_half_conversions():
        return b.fpext(b.bitcast(half, vector(ir.HalfType())), single)
    bits = b.zext(half, vector(I32))
    magnitude = b.and_(bits, _c(0x7FFF))
    normal = b.add(b.shl(magnitude, _c(13)), _c(0x38000000))
    special = b.add(normal, _c(0x38000000))  # infinity and NaN
    # A subnormal is mantissa * 2**-24, which is the spacing of float32 in [0.5, 1): put the
    # mantissa there and take the 0.5 off. No operand is subnormal in float32, so a thread that
    # flushes subnormals to zero gets the same value.
    small = _add_floats(b, b.or_(magnitude, _c(0x3F000000)), _c(0xBF000000))
    result = b.select(b.icmp_unsigned(">=", magnitude, _c(0x7C00)), special, normal)
    quiet = b.or_(result, _c(0x00400000))
    result = b.select(b.icmp_unsigned(">", magnitude, _c(0x7C00)), quiet, result)
    result = b.select(b.icmp_unsigned("<", magnitude, _c(0x0400)), small, result)
    return b.bitcast(b.or_(result, b.shl(b.and_(bits, _c(0x8000)), _c(16))), single)


@lowers(lanes.f16, types.CPointer, types.Integer, gives=F32)
def _f16(builder: Any, _sig: Any, base: Any, at: Any) -> Any:
    # In all lanes from the start: a scalar load into a vector register waits for what the register
    # held before.
    bits = builder.load(place(builder, base, at, I16), align=1)
    return _widen_half(builder, splat(builder, bits))


@lowers(lanes.as_f16, types.Integer, gives=F32)
def _as_f16(builder: Any, _sig: Any, bits: Any) -> Any:
    return _widen_half(builder, splat(builder, builder.trunc(bits, I16)))


@lowers(lanes.widen_f16, Lanes, gives=F32)
def _widen_f16(builder: Any, _sig: Any, value: Any) -> Any:
    return _widen_half(builder, value)


@lowers(lanes.widen_bf16, Lanes, gives=F32)
def _widen_bf16(builder: Any, _sig: Any, value: Any) -> Any:
    upper = builder.shl(builder.zext(value, vector(I32)), constant(I32, 16))
    return builder.bitcast(upper, vector(ir.FloatType()))


@lowers(lanes.narrow_f16, Lanes, gives=U16)
def _narrow_f16(builder: Any, _sig: Any, value: Any) -> Any:
    b = builder
    if _has_half_conversions():
        return b.bitcast(b.fptrunc(value, vector(ir.HalfType())), vector(I16))
    bits = b.bitcast(value, vector(I32))
    magnitude = b.and_(bits, _c(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, _c(13)), _c(1))
    # Rounding may carry into the exponent, and from the largest float16 into infinity. The
    # difference wraps where one of the next lines replaces it.
    half = b.lshr(b.add(b.add(magnitude, _c(0x0FFF)), odd), _c(13))
    half = b.sub(half, _c(0x1C000))
    small = b.sub(
        _add_floats(b, magnitude, _c(0x3F000000)), _c(0x3F000000)
    )  # the sum rounds at 2**-24
    half = b.select(b.icmp_unsigned("<", magnitude, _c(0x38800000)), small, half)
    half = b.select(b.icmp_unsigned(">=", magnitude, _c(0x47800000)), _c(0x7C00), half)
    payload = b.and_(b.lshr(magnitude, _c(13)), _c(0x01FF))
    nan = b.icmp_unsigned(">", magnitude, _c(0x7F800000))
    half = b.select(nan, b.or_(payload, _c(0x7E00)), half)
    sign = b.and_(b.lshr(bits, _c(16)), _c(0x8000))
    return b.trunc(b.or_(half, sign), vector(I16))


@lowers(lanes.narrow_normal_bf16, Lanes, Lanes, gives=Lanes(types.uint16, 2 * LANES))
def _narrow_normal_bf16(builder: Any, sig: Any, low: Any, high: Any) -> Any:
    if not target().has("avx512bf16"):
        return join(builder, sig, *(_narrow_bf16(builder, sig, value) for value in (low, high)))
    # By its name, as LLVM knows it of bfloat16 only, and stores of those would not pass the caches.
    kind = ir.FunctionType(vector(I16, 2 * LANES), [high.type, low.type])
    return builder.asm(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [high, low], False)


@lowers(lanes.narrow_bf16, Lanes, gives=U16)
def _narrow_bf16(builder: Any, _sig: Any, value: Any) -> Any:
    # The processors' own conversion flushes subnormals to zero, so it is done on the bits.
    b = builder
    bits = b.bitcast(value, vector(I32))
    odd = b.and_(b.lshr(bits, _c(16)), _c(1))
    rounded = b.add(b.add(bits, _c(0x7FFF)), odd)
    nan = b.or_(bits, _c(0x00400000))
    chosen = b.select(b.fcmp_unordered("uno", value, value), nan, rounded)
    # The upper halves, taken by a shuffle: with that of the next 16 it becomes one instruction.
    halves = b.bitcast(chosen, vector(I16, 2 * LANES))
    odd_ones = ir.Constant(vector(I32), list(range(1, 2 * LANES, 2)))
    return b.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), odd_ones)
