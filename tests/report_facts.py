"""Facts for reports that tests construct: machines of any shape, models of many tensors, traces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from doctor_stories import told
from machines import Machine, Pci
from numaload.doctor.diagnosis import examine
from numaload.doctor.speeds import Speeds
from numaload.linux.placement import Placement
from numaload.linux.syscalls import PAGE
from numaload.machine.devices import Device, FileDevice
from numaload.pagecache.residency_report import FileResidency
from numaload.report.collect import Facts, Replica, TensorPlace
from numaload.report.timeline import timeline_of

MIB = 1 << 20
# {tensor of a layer: (type, shape, bytes)}, as of DeepSeek-V3 in Q4_K
MOE: dict[str, tuple[str, tuple[int, ...], int]] = {
    "attn_norm.weight": ("F32", (7168,), 28672),
    "attn_q_a.weight": ("Q8_0", (1536, 7168), 11_698_176),
    "attn_q_a_norm.weight": ("F32", (1536,), 6144),
    "attn_q_b.weight": ("Q8_0", (24576, 1536), 40_108_032),
    "attn_kv_a_mqa.weight": ("Q8_0", (576, 7168), 4_386_816),
    "attn_kv_a_norm.weight": ("F32", (512,), 2048),
    "attn_kv_b.weight": ("Q8_0", (32768, 512), 17_825_792),
    "attn_output.weight": ("Q5_K", (7168, 16384), 80_740_352),
    "ffn_norm.weight": ("F32", (7168,), 28672),
    "ffn_gate_inp.weight": ("F32", (256, 7168), 7_340_032),
    "exp_probs_b.bias": ("F32", (256,), 1024),
    "ffn_gate_exps.weight": ("Q4_K", (256, 2048, 7168), 2_113_929_216),
    "ffn_up_exps.weight": ("Q4_K", (256, 2048, 7168), 2_113_929_216),
    "ffn_down_exps.weight": ("Q6_K", (256, 7168, 2048), 3_082_813_440),
    "ffn_gate_shexp.weight": ("Q4_K", (2048, 7168), 8_257_536),
    "ffn_up_shexp.weight": ("Q4_K", (2048, 7168), 8_257_536),
}
THREE = Machine(
    {0: ("0-31", 1_160_000), 1: ("32-63", 1_161_000), 2: ("", 515_000)},
    ["10 21 14", "21 10 24", "14 24 10"],
    sockets={0: 0, 1: 1},
    pci={
        "0000:3b:00.0": Pci("0x030200", 0, "0-31", "nvidia"),
        "0000:b1:00.0": Pci("0x030200", 1, "32-63", "nvidia"),
    },
)


def names(count: int) -> Iterator[tuple[str, int | None, tuple[str, tuple[int, ...], int]]]:
    """Yield (name, layer, (type, shape, bytes)) of so many tensors."""
    yield "token_embd.weight", None, ("Q4_K", (129280, 7168), 521_256_960)
    yield "output.weight", None, ("Q6_K", (129280, 7168), 760_166_400)
    for i in range(count - 2):
        layer, which = divmod(i, len(MOE))
        name = list(MOE)[which]
        yield f"blk.{layer}.{name}", layer, MOE[name]


def constructed_facts(root: Path, shape: Machine = THREE, count: int = 1000, **said: Any) -> Facts:
    """Return facts of a model on this machine: replicas on two nodes, half of it in page cache.

    said: fields of the facts, instead of these.
    """
    rows, nodes = [], [node for node, (_, mib) in shape.nodes.items() if mib]
    home, far = nodes[0], nodes[-1]
    for name, layer, (kind, dims, nbytes) in names(count):
        there = nbytes if (layer or 0) < 20 else nbytes // 3 if layer == 20 else 0
        cached = {home: there - there // 4, far: there // 4} if home != far else {home: there}
        mirrored = tuple({node: nbytes} for node in nodes[:2])
        rows.append(TensorPlace(name, kind, dims, nbytes, layer, cached, mirrored))
    size = sum(row.nbytes for row in rows) + 8 * MIB
    cached_on = {node: sum((row.cached or {}).get(node, 0) for row in rows) for node in nodes}
    path = str(Path.home() / "models/DeepSeek-V3-Q4_K_M-00001-of-00009.gguf")
    disks = FileDevice(path, "ext4", "nvme0n1p2", ("nvme0n1",), (nodes[0],), "")
    resident = sum(cached_on.values())
    system = told(
        root,
        shape,
        size,
        {"/sys/block/nvme0n1/queue/read_ahead_kb": "128\n"},
        device=Device("nvme", "nvme0n1p2", "ext4", 1, read_ahead=128 << 10),
        disks=disks,
        absent=size - resident,
        cache_nodes={node: n for node, n in cached_on.items() if n},
        speeds=Speeds(6.4e9, 0.9e9, 14.2e9, 236 << 20, 0.9),
    )
    system.path = path
    facts: dict[str, Any] = {
        "diagnosis": examine(system),
        "machine": system.machine,
        "gpus": system.gpus,
        "disks": disks,
        "architecture": "deepseek2",
        "files": [FileResidency(path, size, resident, on_nodes=cached_on)],
        "tensors": rows,
        "replicas": [_replica(node, size) for node in nodes[:2]],
        "timeline": timeline_of(load_events(nodes[:2]), str(Path.home() / "trace.json")),
        "when": 1_795_000_000.0,
    }
    return Facts(**facts | said)


def _replica(node: int, size: int) -> Replica:
    pages = -(-size // PAGE)
    found = Placement([node], pages, {node: pages}, {node: 10_000}, size // 2 * 2)
    return Replica(
        (node,), "mirror", {node: size}, True, "unchanged", 7500.0, 2 * size, 131.0, found, ""
    )


def load_events(nodes: list[int], chunks: int = 300) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a load: two threads for each node that read, copy and checksum."""
    rng, end = random.Random(7), 0.0
    for node in nodes:
        for thread in range(2):
            tid, at = 100 * node + thread + 10, 200_000.0 + 50_000 * thread
            named = {"name": f"numaload-{node}-{thread}"}
            yield {"ph": "M", "name": "thread_name", "pid": 9, "tid": tid, "args": named}
            for i in range(chunks):
                for stage, most in (("read", 90e3), ("checksum", 8e3)):
                    lasted = rng.uniform(most / 2, most) * (4 if i % 100 > 90 else 1)
                    args = {"bytes": 16 * MIB, "node": node}
                    yield event(stage, at, lasted, tid, args)
                    at += lasted
            end = max(end, at)
    yield event("open", 0, 180_000, 9, {})
    yield event("load", 0, end + 5000, 9, {"bytes": chunks * 64 * MIB})
    yield event("prove", end, 400_000, 9, {})


def event(
    name: str, ts: float, dur: float, tid: int | str = 1, args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": ts, "dur": dur, "pid": 9, "tid": tid, "args": args or {}}
