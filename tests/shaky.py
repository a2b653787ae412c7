"""A proxy before an object store that fails by plan: busy, broken, reset, stalled and cut short."""

import http.client
import itertools
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FAULTS = ("busy", "broken", "reset", "lost", "cut", "stall")


class Proxy:
    """Every request whose turn it is fails first: of `every` requests one, by one fault after the other.

    busy: 503 SlowDown; broken: 500; reset: the connection is reset; lost: the store does what it is asked, then the
    connection is reset before the answer; cut: half of the answer; stall: nothing for `patience` seconds, then the end.

    It is a process of its own: what asks it may hold the interpreter while it waits for the answer, as GDAL does.

    Attributes:
        url: where it listens.
        met: fault and method of every request that failed.
    """

    def __init__(self, target, *, every=5, patience=0.5):
        words = [sys.executable, __file__, target, str(every), str(patience)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._process.stdout.readline().strip()
        self.met = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        self.met.extend(tuple(line.split()) for line in self._process.stdout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target, every, patience):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.every, self.patience = target, every, patience
        self.faults, self.turn, self.lock = itertools.cycle(FAULTS), itertools.count(1), threading.Lock()

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

    def _pass_on(self):
        server = self.server
        fault = next(server.faults) if next(server.turn) % server.every == 0 else ""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault:
            server.note(f"{fault} {self.command}\n")
        if fault in {"busy", "broken"}:
            return self._answer(503 if fault == "busy" else 500, {"Content-Type": "application/xml"}, BUSY)
        if fault == "stall":
            time.sleep(server.patience)
        if fault in {"reset", "stall"}:
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


def _main(target, every, patience):
    server = _Server(target, int(every), float(patience))
    print("http://{}:{}".format(*server.server_address), flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # ends with the one who asked for it


if __name__ == "__main__":
    _main(*sys.argv[1:])
