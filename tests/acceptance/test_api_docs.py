"""Every public name has its place in docs, and the examples there run."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import Numaload
from numaload.demo import write_model
from pages import DOCS, blocks, fences, run

# Each block in a namespace of its own, as a reader would run it; one process for a page.
RUN = "import sys\nfor block in sys.argv[1:]:\n    exec(compile(block, 'block', 'exec'), {})\n"
PAGES = ["weights.md", "page-cache.md", "replicas.md", "placement.md", "store.md", "exec.md",
         "doctor.md", "tune.md", "errors.md", "backends.md"]  # fmt: skip
BACKENDS = {
    "gguf_reader": ["install", "GGUFReader"],
    "kt_kernel": import_module("numaload.backends.kt_kernel").__all__,
    "ktransformers": import_module("numaload.backends.ktransformers").__all__,
    "lora": ["open_adapter", "Adapter"],
    "transformers": ["from_pretrained"],
}
# Classes that users are given by calls of public names.
MEMBERS = [
    "weights.Weights", "weights.Tensor", "formats.metadata.Metadata", "replicas.views.Mirror",
    "pagecache.job.PrewarmJob", "pagecache.background.PrewarmHolder", "machine.topology.Topology",
    "machine.topology.Node", "replicas.views.MirrorReport", "pagecache.prewarm.PrewarmReport",
    "pagecache.residency_report.ResidencyReport", "pagecache.evict.EvictReport",
    "pagecache.evict.EvictedFile", "linux.placement.Placement", "replicas.verify.Verified",
    "replicas.layout.Share", "replicas.exec.Ended", "doctor.diagnosis.Diagnosis",
    "bench.tune.TuneReport", "bench.tune.TunedSink",
]  # fmt: skip
# What only other modules of numaload call: public between them, no face for users.
INTERNAL = {
    "Weights": {"parts", "model", "workers", "read_into", "read_by", "in_files", "companions",
                "copied", "owned", "is_apart", "nodes_of"},
    "Tensor": {"check_type", "check_native", "is_file", "file", "place_in_files", "workers",
               "read_into", "read_by", "byte_shape", "memory", "block", "check_alone", "code",
               "conversion", "fetch", "scales", "check_scales", "scale_names", "weight_name"},
    "Metadata": {"keys", "values", "items", "get"},
    "PrewarmHolder": {"of"},
    "PrewarmReport": {"from_dict"},
    "Mirror": {"owns_weights", "off_node", "built", "only", "model"},
    "Topology": {"copies_note"},
}  # fmt: skip


def headings() -> set[str]:
    texts = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    return {name for text in texts for name in re.findall(r"^#{2,3} (\S+)$", text, re.MULTILINE)}


def section(name: str) -> str:
    """The text below a heading, up to the next one of its kind; of all pages that have one."""
    found = []
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        found += re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return "".join(found)


@pytest.mark.parametrize("name", api.__all__)
def test_a_public_name_has_a_heading(name: str) -> None:
    assert name in headings()


@pytest.mark.parametrize("name", ["open", "prewarm", "prewarm_async", "residency", "evict",
                                  "mirror", "attach", "exec", "diagnose", "tune"])  # fmt: skip
def test_every_parameter_is_explained(name: str) -> None:
    parameters = inspect.signature(getattr(api, name)).parameters
    said = section(name)
    assert [word for word in parameters if not re.search(rf"\b{word}\b", said)] == []


@pytest.mark.parametrize("place", MEMBERS)
def test_every_member_is_named(place: str) -> None:
    module, _, name = place.rpartition(".")
    kind: Any = getattr(import_module(f"numaload.{module}"), name)
    fields = getattr(kind, "__dataclass_fields__", {})
    members = {m for m in {*vars(kind), *fields} if not m.startswith("_")}
    within = {"Node": "Topology", "EvictedFile": "EvictReport", "TunedSink": "TuneReport"}.get(
        name, name
    )
    said = section(within)
    missing = members - INTERNAL.get(name, set()) - {"check", "to_dict"}
    assert sorted(m for m in missing if not re.search(rf"\b{m}\b", said)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_name_of_a_backend_is_explained(backend: str) -> None:
    said = section(rf"numaload\.backends\.{backend}")
    assert [name for name in BACKENDS[backend] if f"`{name}" not in said] == []


def test_every_error_is_explained() -> None:
    said = section("errors")
    kinds = [n for n, kind in vars(api.errors).items()
             if inspect.isclass(kind) and issubclass(kind, (Exception, Warning))]  # fmt: skip
    assert len(kinds) > 25
    assert [n for n in kinds if n[0] != "_" and f"`{n}`" not in said] == []


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, numaload: Numaload, tmp_path: Path) -> None:
    write_model(str(tmp_path / "model.gguf"), 3 << 20)
    found = blocks(page)
    assert len(found) == fences(page)
    run([sys.executable, "-c", RUN, *found], tmp_path, numaload)
