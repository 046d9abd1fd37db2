"""The site as it is built: its links lead somewhere, it loads nothing from elsewhere, and a browser shows it without a cut."""

from __future__ import annotations

import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install -e '.[docs]'")
pytest.importorskip("mkdocstrings", reason="the site needs mkdocstrings: pip install -e '.[docs]'")
pytest.importorskip("latex2mathml", reason="the site's formulas need latex2mathml: pip install -e '.[docs]'")
ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "docs/mkdocs.yml"), "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif found.get("src") or (tag == "link" and found.get("rel") != "canonical" and found.get("href")):
            self.loads.append(found.get("src") or found["href"])


@pytest.fixture(scope="module")
def pages(site):
    """Each page by its address from the root of the site."""
    return {
        "/" + path.relative_to(site).as_posix().removesuffix("index.html"): Page(path) for path in site.rglob("*.html")
    }


def test_every_link_leads_somewhere(site, pages):
    broken = []
    for address, page in pages.items():
        if address == "/404.html":  # is shown at any address, so its links start at the root of the server
            continue
        for link in page.links + page.loads:
            target = urlsplit(urljoin("http://here" + address, link))
            if target.netloc != "here":
                continue
            path, place = unquote(target.path), unquote(target.fragment)
            if not (site / path.removeprefix("/")).exists() or (
                place and path in pages and place not in pages[path].places
            ):
                broken.append(f"{address}: {link}")
    assert len(pages) > 30
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert {load for page in pages.values() for load in page.loads if urlsplit(load).netloc} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*", styles) == []


# Loads each page in a frame of each width, and reports what is wider than its place. A frame's page sees the frame's width
# as a window's. `text` is a program's output: on a phone it is scrolled in its own block, as code and tables are.
LOOK = """<!doctype html><body><script>
async function look(page, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {width, height: 900, src: page});
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  const root = frame.contentDocument.documentElement, faults = [];
  if (frame.contentDocument.querySelector("title") === null) faults.push("is not there");
  for (const part of [root, frame.contentDocument.body])
    if (part.scrollWidth > part.clientWidth + 1) faults.push(`is ${part.scrollWidth} wide`);
  for (const image of root.querySelectorAll("img"))
    if (image.loading !== "lazy" && image.naturalWidth === 0) faults.push(`image ${image.getAttribute("src")} is not shown`);
  if (width > 1000)
    for (const part of root.querySelectorAll("pre > code, .md-typeset__scrollwrap"))
      if (part.scrollWidth > part.clientWidth + 1)
        faults.push(`is cut (${part.scrollWidth} > ${part.clientWidth}): ${part.innerText.trim().slice(0, 60)}`);
  frame.remove();
  return faults.map(fault => `${page} at ${width}: ${fault}`);
}
async function main(work) {
  const faults = [];
  const one = async () => { while (work.length) faults.push(...await look(...work.pop())); };
  await Promise.all(Array.from({length: 4}, one));
  await fetch("/seen", {method: "POST", body: JSON.stringify(faults)});
}
main(WORK);
</script></body>"""


@pytest.mark.skipif(
    BROWSER is None, reason="there is no browser: chromium, chromium-browser or google-chrome on the PATH"
)
def test_a_browser_shows_every_page_whole(site, pages):
    """On a screen of 1300 and on a phone of 400 pixels: no page scrolls to the side, and on the screen no code or table does."""
    wide = "<title>wide</title><div style='width: 2000px'>a page that is too wide, to see that the test sees it</div>"
    shown = [*(page for page in sorted(pages) if page != "/404.html"), "/too-wide"]
    seen: queue.Queue[list[str]] = queue.Queue()

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            work = json.dumps([(page, width) for page in shown for width in (1300, 400)])
            text = {"/look": LOOK.replace("WORK", work), "/too-wide": wide}.get(self.path)
            if text is None:
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Server(*args, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Without the sandbox, which root and most containers do not have: it shows no pages but ours.
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += [f"--user-data-dir={profile}", "--window-size=1400,1000", "--remote-debugging-port=0"]
        command += [f"http://127.0.0.1:{server.server_port}/look"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            faults = seen.get(timeout=240)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
            server.server_close()
    seen_wide = {fault.split(":")[0] for fault in faults if fault.startswith("/too-wide")}
    assert seen_wide == {"/too-wide at 1300", "/too-wide at 400"}
    faults = [fault for fault in faults if not fault.startswith("/too-wide")]
    assert not faults, "\n".join(faults)
