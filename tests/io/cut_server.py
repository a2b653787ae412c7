"""Serves one file whose first answer to each path /<n>/... ends after n bytes, and a process of its own: GDAL holds
the interpreter while it waits."""

import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = Path(sys.argv[1]).read_bytes()
asked = set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self):
        first, last = re.findall(r"\d+", self.headers.get("Range", "")) or (0, len(CONTENT) - 1)
        first, last = int(first), min(int(last), len(CONTENT) - 1)
        part = CONTENT[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.end_headers()
        cut = self.path not in asked
        asked.add(self.path)
        self.wfile.write(part[: int(self.path.split("/")[1])] if cut else part)
        self.close_connection = cut


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
