"""Loops that measurements need and no kernel has, in LLVM's own language: nothing here is numba's.

All are functions of (address, count) that return a number. `objects.Loop` links and calls them.
"""

from __future__ import annotations

from numaload.kernels.jit.target import target

READ_STEP = 256  # bytes that ``read`` takes at a time: four cache lines

# Reads ``count`` times READ_STEP bytes in order. Four sums, so that no load waits for another one.
# Returning what was read keeps the loads.
_LINES = range(READ_STEP // 64)
READ = f"""
declare i64 @llvm.vector.reduce.xor.v8i64(<8 x i64>)

define i64 @read(ptr %from, i64 %count) {{
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %after, %next ]
{
    "".join(
        f"  %s{n} = phi <8 x i64> [ zeroinitializer, %entry ], [ %t{n}, %next ]" + chr(10)
        for n in _LINES
    )
}
  %at = mul i64 %i, {READ_STEP}
{
    "".join(
        f'''  %o{n} = add i64 %at, {64 * n}
  %p{n} = getelementptr i8, ptr %from, i64 %o{n}
  %v{n} = load <8 x i64>, ptr %p{n}, align 64
  %t{n} = xor <8 x i64> %s{n}, %v{n}
'''
        for n in _LINES
    )
}
  %after = add i64 %i, 1
  %more = icmp ult i64 %after, %count
  br i1 %more, label %next, label %end
end:
  %a = xor <8 x i64> %t0, %t1
  %b = xor <8 x i64> %t2, %t3
  %c = xor <8 x i64> %a, %b
  %sum = call i64 @llvm.vector.reduce.xor.v8i64(<8 x i64> %c)
  ret i64 %sum
}}
"""

# Follows ``count`` addresses, each read from where the last one points: no load can begin before
# the one before it has ended. Returns the address reached.
CHASE = """
define i64 @chase(ptr %from, i64 %count) {
entry:
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %after, %next ]
  %at = phi ptr [ %from, %entry ], [ %to, %next ]
  %to = load ptr, ptr %at, align 8
  %after = add i64 %i, 1
  %more = icmp ult i64 %after, %count
  br i1 %more, label %next, label %end
end:
  %reached = ptrtoint ptr %to to i64
  ret i64 %reached
}
"""

# Writes eax, ebx, ecx and edx of the instruction for leaf ``count`` to 16 bytes.
CPUID = """
define i64 @cpuid(ptr %to, i64 %leaf) {
  %eax = trunc i64 %leaf to i32
  %all = call { i32, i32, i32, i32 } asm sideeffect "cpuid",
         "={ax},={bx},={cx},={dx},{ax},{cx}"(i32 %eax, i32 0)
  store { i32, i32, i32, i32 } %all, ptr %to, align 4
  ret i64 0
}
"""

SOURCES = {"read": READ, "chase": CHASE, "cpuid": CPUID}


def has_cpuid() -> bool:
    """Return whether this processor has that instruction."""
    return target().triple.startswith("x86_64")
