"""The report in a real browser, where there is one: nothing on the console, no request but for the page."""

from __future__ import annotations

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from seft_ds.report.facts import facts_of
from seft_ds.report.page import page
from tests.report.test_page import _records
from tests.report.test_sections import DELTAS, EXCHANGE, MEMORY

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
SCRIPT = "<script>console.error('ran')</script>"

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")


def look(text: str, home: Path) -> tuple[list[str], list[str], bytes]:
    """Requests, lines of the console, and the screenshot of a page that a server on this machine gives."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = text.encode() if self.path == "/report.html" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home.mkdir()
    picture = home / "page.png"
    try:
        done = subprocess.run(
            [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={home}", "--no-first-run", "--disable-background-networking",
             "--window-size=390,1200", f"--screenshot={picture}",
             f"http://127.0.0.1:{server.server_port}/report.html"],
            capture_output=True, text=True, timeout=120, cwd=home,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return asked, console, picture.read_bytes()


def test_the_report_in_a_browser(tmp_path: Path) -> None:
    text = page(facts_of([*_records(), EXCHANGE, MEMORY, DELTAS]), "my run")
    asked, console, picture = look(text, tmp_path / "whole")
    assert asked == ["/report.html"] and console == []
    assert len(picture) > 10_000  # something was drawn
    # What this test sees of a page without a policy: a script that runs, a picture that is asked for.
    worse = text.replace("</main>", f"{SCRIPT}<img src='/other.png'></main>")
    worse = worse.replace("Content-Security-Policy", "nothing")
    asked, console, _ = look(worse, tmp_path / "worse")
    assert "/other.png" in asked and any("ran" in line for line in console)
