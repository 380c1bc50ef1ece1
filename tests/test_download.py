"""A download goes on where it broke, in the same process and after a kill."""

import hashlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from nightshift.fixed import download
from nightshift.fixed.config import ROOT

DATA = random.Random(0).randbytes(3_000_000)
SIZE = len(DATA)
SHA256 = hashlib.sha256(DATA).hexdigest()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves DATA. `cut`: each answer ends after so many bytes; `stall`: it then hangs instead."""

    cut: int | None = None
    stall = False
    knows_range = True
    status: int | None = None
    sent: list[tuple[int, int]] = []  # (first byte, how many) of each answer

    def do_GET(self):
        if self.status:
            return self.send_error(self.status)
        wanted = self.headers.get("Range")
        start = int(wanted[6:-1]) if wanted and self.knows_range else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        part = DATA[start : None if self.cut is None else start + self.cut]
        self.sent.append((start, len(part)))  # first: the client may be done before write() returns
        self.wfile.write(part)
        if self.stall:
            time.sleep(60)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    """(handler, address)"""
    handler = type("Handler", (Files,), {"sent": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/f"
    server.shutdown()


def fetch(address, place, sha256=SHA256, size=SIZE):
    return download.download(address, place, size, sha256, {})


def test_a_broken_connection_goes_on_at_its_byte(site, tmp_path):
    handler, address = site
    handler.cut = 1_000_000
    assert fetch(address, tmp_path / "f").read_bytes() == DATA
    assert handler.sent == [(0, 1_000_000), (1_000_000, 1_000_000), (2_000_000, 1_000_000)]
    assert os.listdir(tmp_path) == ["f"]


def test_what_is_there_is_not_asked_for_again(site, tmp_path):
    handler, address = site
    fetch(address, tmp_path / "f")
    fetch(address, tmp_path / "f")
    assert len(handler.sent) == 1


def test_a_killed_download_goes_on_where_it_was(site, tmp_path):
    handler, address = site
    handler.cut, handler.stall = 2_000_000, True
    code = "import sys; from pathlib import Path; from nightshift.fixed import download as d\n"
    code += "d.download(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), None, {})"
    command = [sys.executable, "-c", code, address, str(tmp_path / "f"), str(len(DATA))]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    partial = tmp_path / "f.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= 1_000_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = partial.stat().st_size
    handler.cut, handler.stall = None, False
    assert fetch(address, tmp_path / "f").read_bytes() == DATA
    assert handler.sent[-1] == (kept, len(DATA) - kept)


def test_a_server_without_ranges_sends_all_of_it_again(site, tmp_path):
    handler, address = site
    handler.knows_range = False
    (tmp_path / "f.partial").write_bytes(DATA[:1_000_000])
    assert fetch(address, tmp_path / "f").read_bytes() == DATA


def test_damaged_bytes_are_refused_and_not_kept(site, tmp_path):
    handler, address = site
    (tmp_path / "f.partial").write_bytes(b"x" * 1000)
    with pytest.raises(ConnectionError, match="damaged"):
        fetch(address, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    assert fetch(address, tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize(("status", "asked"), [(404, "HTTP 404"), (503, "stopped at byte 0")])
def test_a_server_that_refuses_is_one_line(site, tmp_path, status, asked):
    handler, address = site
    handler.status = status
    with pytest.raises(ConnectionError, match=asked):
        fetch(address, tmp_path / "f")


def test_nobody_there_is_one_line(tmp_path):
    with pytest.raises(ConnectionError, match="stopped at byte 0"):
        fetch("http://127.0.0.1:9/f", tmp_path / "f")


def test_two_at_once_download_it_once(site, tmp_path):
    handler, address = site
    threads = [threading.Thread(target=fetch, args=(address, tmp_path / "f")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_bytes() == DATA and len(handler.sent) == 1
