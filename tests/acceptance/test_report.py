"""``numaload report`` as users run it, and its page in a real browser."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import KEPT, LIMIT_S, Numaload, evict
from numaload.cli.page.markup import START
from numaload.cli.page.sections import page_of
from numaload.cli.page.style import COLORS
from report_facts import constructed_facts

WIDTHS = (360, 800, 1400)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
# What is measured of the page in a frame of each width, closed and with all layers open.
FRAMES = """<!DOCTYPE html><title>measure</title>{frames}<pre></pre><script>
onload = () => {{
  const seen = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const beyond = () => root.scrollWidth - root.clientWidth;
    const closed = beyond();
    page.querySelectorAll("details").forEach(one => one.open = true);
    return {{
      width: root.clientWidth, closed, open: beyond(), height: root.scrollHeight,
      ground: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").length,
    }};
  }});
  document.querySelector("pre").textContent = JSON.stringify(seen);
}};
</script>"""


def test_report_writes_one_page(model: str, numaload: Numaload, tmp_path: Path) -> None:
    """Of a model with a replica, over an earlier page; nothing else is left beside it."""
    numaload("mirror", model)
    page = tmp_path / "page.html"
    page.write_text(f"{START} an earlier page")
    done = numaload("report", model, "-o", page)
    assert re.fullmatch(rf"{re.escape(str(page))}: \d+\.\d KiB\n", done.stdout)
    text = page.read_text()
    assert text.startswith(START)
    assert text.endswith("</html>\n")
    for said in (
        "blk.0.attn_q.weight",
        "replica on node",
        "pages there (100 %)",
        "making the report",
    ):
        assert said in text
    assert list(tmp_path.iterdir()) == [page]
    assert numaload("report", model, "-o", "-").stdout.startswith(START)


def test_report_as_json_has_what_the_page_shows(
    model: str, model_files: list[str], numaload: Numaload
) -> None:
    evict(model_files)
    api.prewarm(model, tensors="attn_q")
    before = sum(tensor.resident for tensor in api.residency(model).tensors.values())
    found = numaload.json("report", model)
    with api.open(model) as weights:
        assert [(row["name"], row["nbytes"]) for row in found["tensors"]] == [
            (tensor.name, tensor.nbytes) for tensor in weights.values()
        ]
    cached = {row["name"]: sum(row["cached"].values()) for row in found["tensors"]}
    assert all(cached[row["name"]] <= row["nbytes"] for row in found["tensors"])
    assert KEPT * before <= sum(cached.values()) <= before
    assert {lane["stage"] for lane in found["timeline"]["lanes"]} >= {"open", "parse"}


def test_report_draws_a_recorded_load(model: str, numaload: Numaload, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = numaload.command("mirror", model)
    environment = numaload.environment | {"NUMALOAD_TRACE": str(trace)}
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=LIMIT_S)
    found = numaload.json("report", model, "--trace", trace)["timeline"]
    assert found["source"] == str(trace)
    assert found["odd"] == 0
    assert "hash" in {lane["stage"] for lane in found["lanes"]}
    numaload("report", model, "--trace", trace, "-o", tmp_path / "page.html")
    assert "trace.json, over" in (tmp_path / "page.html").read_text()


OWN = {"own": "<!DOCTYPE html><h1>My own site</h1>", "empty": "", "cut": START[:-1]}


@pytest.mark.parametrize("there", ["model", "folder", "fifo", "link", "dangling", *OWN])
def test_report_replaces_nothing_but_pages(
    there: str, model: str, numaload: Numaload, tmp_path: Path
) -> None:
    output = tmp_path / "page.html"
    if there == "folder":
        output.mkdir()
    elif there == "fifo":
        os.mkfifo(output)
    elif there == "dangling":
        output.symlink_to("nowhere")
    elif there in OWN:
        output.write_text(OWN[there])
    else:
        (shutil.copy if there == "model" else os.symlink)(model, output)
    before = output.lstat()
    done = numaload("report", model, "-o", output, status=2)
    assert f"{output} is there and is no page" in done.stderr
    after = output.lstat()
    assert (after.st_ino, after.st_size, stat.S_IFMT(after.st_mode)) == (
        before.st_ino, before.st_size, stat.S_IFMT(before.st_mode)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ((), 2, "expected either -o PAGE.html, or --json"),
        (("-o", "page.html", "--json"), 2, "expected either -o PAGE.html, or --json"),
        (("-o", "/nowhere/page.html"), 1, "/nowhere/page.html: no page can be written there"),
        (("-o", "a" * 250), 1, "aaa: no page can be written there: File name too long"),
        (("-o", "/"), 2, "/: expected the name of a file"),
        (("--json", "--trace", __file__), 1, "expected [ of trace events"),
        (("--json", "--trace", "/nowhere"), 1, "/nowhere: No such file"),
    ],
)
def test_report_says_what_is_wrong_with_a_command(
    words: tuple[str, ...], status: int, said: str, model: str, numaload: Numaload
) -> None:
    assert said in numaload("report", model, *words, status=status).stderr


@pytest.mark.parametrize(
    ("mounted", "said"),
    [("ro", "Read-only file system"), ("size=4k", "No space left on device")],
)
def test_report_says_why_its_page_cannot_be_written(
    mounted: str, said: str, model: str, numaload: Numaload, tmp_path: Path
) -> None:
    own = ["unshare", "-r", "-m"]
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces may be made here")
    mount = f'mount -t tmpfs -o {mounted} tmpfs "$0" && exec "$@"'
    page = tmp_path / "page.html"
    done = subprocess.run(
        [*own, "sh", "-c", mount, str(tmp_path), *numaload.command("report", model, "-o", page)],
        env=numaload.environment, capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert f"error: {page}: no page can be written there: {said}\n" in done.stderr
    assert done.returncode == 1


def test_report_of_what_is_no_model_shows_the_machine(numaload: Numaload, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no model")
    numaload("report", tmp_path / "text", "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "no tensors are shown" in text
    assert "Node 0" in text


# In a browser ------------------------------------------------------------------------------------


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serve a folder; note what is asked for."""

    asked: list[str]

    def __init__(self, *arguments: Any, asked: list[str], **options: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The page of 1,000 tensors on three nodes, on a server; what is asked of that."""
    folder, asked = tmp_path_factory.mktemp("page"), list[str]()
    page = page_of(constructed_facts(folder / "machine"), "numaload report model.gguf")
    (folder / "page.html").write_text(page)
    frames = "".join(f'<iframe src="page.html" width="{w}" height="800"></iframe>' for w in WIDTHS)
    (folder / "frames.html").write_text(FRAMES.format(frames=frames))
    handler = partial(_Handler, directory=str(folder), asked=asked)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.skipif(not CHROMIUM, reason="no browser: sudo apt-get install -y chromium")
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)], ids=["light", "dark"])
def test_page_in_a_browser(
    scheme: int, dark: bool, served: tuple[str, list[str]], tmp_path: Path
) -> None:
    """It fits three widths, follows the system's colours, and asks for nothing but itself."""
    address, asked = served
    asked.clear()
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}", f"--blink-settings=preferredColorScheme={scheme}",
            "--dump-dom", f"{address}/frames.html",
        ],
        capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    measured = re.search(r"<pre>(.+?)</pre>", done.stdout)
    assert measured is not None, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(measured[1])
    ground = COLORS["page"][dark]
    expected = ", ".join(str(int(ground[i : i + 2], 16)) for i in (1, 3, 5))
    assert [one["ground"] for one in seen] == [f"rgb({expected})"] * len(WIDTHS)
    for one, width in zip(seen, WIDTHS, strict=True):
        assert width - 20 <= one["width"] <= width
        assert (one["closed"], one["open"], one["loaded"]) == (0, 0, 0)
    assert set(asked) - {"/favicon.ico"} == {"/frames.html", "/page.html"}
