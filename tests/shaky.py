"""A proxy before an object store that fails by plan: busy, broken, reset, stalled and cut short."""

import http.client
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
OLD = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
FAULTS = ("busy", "broken", "reset", "lost", "cut", "stall")


class Proxy:
    """Every request whose turn it is fails first: of `every` requests one, by one fault after the other.

    busy: 503 SlowDown; broken: 500; reset: the connection is reset; lost: the store does what it is asked, then the
    connection is reset before the answer; cut: half of the answer; stall: nothing for `patience` seconds, then the end.

    Beyond that it may be silent (answer nothing) for a while, refuse one access key as expired, or have a clock of its
    own. It is a process of its own: what asks it may hold the interpreter while it waits for the answer, as GDAL does.

    Args:
        target: host and port of the store.
        every: see above; 0 for no failures.
        patience: seconds of a stall.
        silent: (after so many requests, for so many seconds).
        expired: (after so many requests, this access key is refused).
        clock: seconds that the store's clock is ahead.

    Attributes:
        url: where it listens.
        met: fault and method of every request that failed.
        asked: number of all requests.
    """

    def __init__(self, target, *, every=5, patience=0.5, silent=(0, 0), expired=(0, ""), clock=0):
        plan = {"every": every, "patience": patience, "silent": silent, "expired": expired, "clock": clock}
        words = [sys.executable, __file__, target, json.dumps(plan)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._process.stdout.readline().strip()
        self.met, self.asked = [], 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.asked += 1
            if not line.startswith("- "):
                self.met.append(tuple(line.split()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target, plan):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.plan, self.silent_until = target, plan, 0.0
        self.faults, self.turns, self.lock = itertools.cycle(FAULTS), itertools.count(1), threading.Lock()

    def fault(self, key):
        """The fault of the next request, which has that access key; "" for none."""
        turn, (after, seconds), (uses, expired) = next(self.turns), self.plan["silent"], self.plan["expired"]
        if seconds and turn == after:
            self.silent_until = time.monotonic() + seconds
        if time.monotonic() < self.silent_until:
            return "silent"
        if expired and key == expired and turn > uses:
            return "expired"
        return next(self.faults) if self.plan["every"] and turn % self.plan["every"] == 0 else ""

    def note(self, line):
        with self.lock:
            sys.stdout.write(line)
            sys.stdout.flush()

    def handle_error(self, *_):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.server.plan["clock"])

    def _pass_on(self):
        server = self.server
        signature = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization") or "")
        fault = server.fault(signature and signature[1])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.note(f"{fault or '-'} {self.command}\n")
        if fault in {"busy", "broken", "expired"}:
            status = {"busy": 503, "broken": 500, "expired": 400}[fault]
            return self._answer(status, {"Content-Type": "application/xml"}, OLD if fault == "expired" else BUSY)
        if fault == "stall":
            time.sleep(server.plan["patience"])
        if fault == "silent":
            time.sleep(max(0.0, server.silent_until - time.monotonic()))
        if fault in {"reset", "stall", "silent"}:
            return self._reset()
        connection = http.client.HTTPConnection(server.target, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        found = connection.getresponse()
        content = found.read()
        connection.close()
        if fault == "lost":
            return self._reset()
        kept = {
            k: v
            for k, v in found.getheaders()
            if k.lower() not in {"connection", "transfer-encoding", "server", "date"}
        }
        if server.plan["clock"] and "Last-Modified" in kept:
            then = parsedate_to_datetime(kept["Last-Modified"]) + timedelta(seconds=server.plan["clock"])
            kept["Last-Modified"] = format_datetime(then, usegmt=True)
        return self._answer(found.status, kept, content, cut=fault == "cut")

    def _answer(self, status, headers, content, *, cut=False):
        self.send_response(status)
        length = headers.pop("Content-Length", headers.pop("content-length", None))
        for name, value in headers.items():
            self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", length if head and length else str(len(content)))
        self.end_headers()
        if head:
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut and content:
            self.wfile.flush()
            self._reset()

    def _reset(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on


def _main(target, plan):
    server = _Server(target, json.loads(plan))
    print("http://{}:{}".format(*server.server_address), flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # ends with the one who asked for it


if __name__ == "__main__":
    _main(*sys.argv[1:])
