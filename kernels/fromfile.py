"""A loop around any kernel that reads its blocks from a file: without Python in between.

Between two reads by Python a thread waits until others let it run again, which takes as long as
converting some hundred thousand weights. So it is one function in LLVM's own language, and parts of
the file can be as small as the caches that they shall stay in.
"""

from __future__ import annotations

import llvmlite.binding as llvm

from numaload.kernels import cache
from numaload.kernels.target import machine

NAME = "from_file"
# (kernel, descriptor, offset, bytes, bytes of a step, bytes of its floats, bytes of a part, memory
# for a part, floats, past the caches) -> bytes that were converted: fewer where pread(2) gave
# nothing, or an error. ``kernel`` is as numba calls it, see `objects.py`.
CODE = f"""
declare i64 @pread(i32, ptr, i64, i64)

define i64 @{NAME}(ptr %kernel, i32 %fd, i64 %offset, i64 %nbytes, i64 %step, i64 %floats_step,
                   i64 %part, ptr %blocks, ptr %floats, i64 %past) {{
entry:
  %result = alloca i64
  %exception = alloca ptr
  br label %next
next:
  %done = phi i64 [ 0, %entry ], [ %converted, %call ]
  %left = sub i64 %nbytes, %done
  %last = icmp ult i64 %left, %part
  %want = select i1 %last, i64 %left, i64 %part
  %over = icmp eq i64 %left, 0
  br i1 %over, label %end, label %read
read:
  %got = phi i64 [ 0, %next ], [ %sum, %more ]
  %to = getelementptr i8, ptr %blocks, i64 %got
  %missing = sub i64 %want, %got
  %begin = add i64 %offset, %done
  %at = add i64 %begin, %got
  %count = call i64 @pread(i32 %fd, ptr %to, i64 %missing, i64 %at)
  %failed = icmp sle i64 %count, 0
  br i1 %failed, label %end, label %more
more:
  %sum = add i64 %got, %count
  %full = icmp uge i64 %sum, %want
  br i1 %full, label %call, label %read
call:
  %steps = udiv i64 %want, %step
  %before = udiv i64 %done, %step
  %bytes = mul i64 %before, %floats_step
  %out = getelementptr i8, ptr %floats, i64 %bytes
  %status = call i32 %kernel(ptr %result, ptr %exception, ptr %blocks, ptr %out, i64 %steps,
                             i64 %past)
  %converted = add i64 %done, %want
  br label %next
end:
  ret i64 %done
}}
"""


def object_code() -> bytes:
    """An object file with the function, from the cache on disk or compiled now."""
    code = cache.load(NAME)
    if code is None:
        code = bytes(machine().emit_object(llvm.parse_assembly(CODE)))
        cache.save(NAME, code)
    return code
