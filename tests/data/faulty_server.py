"""A local HTTP server that misbehaves in every way that servers do."""

import http.server
import threading

import pytest

CONTENT = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Follows the server's script, one entry per request; then answers well."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        self.server.requests.append((self.path, dict(self.headers)))
        act = self.server.script.pop(0) if self.server.script else "well"
        name = self.path.rpartition("/")[2]
        act = self.server.acts[name].pop(0) if self.server.acts.get(name) else act
        content = self.server.files.get(name, CONTENT)
        if isinstance(act, int):
            return self.send_error(act)
        if act == "redirect":
            self.send_response(302)
            self.send_header("Location", "/other")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = 0
        asked = self.headers.get("Range")
        tag = self.server.tag
        if asked and self.headers.get("If-Range") not in (None, tag):
            asked = None
        if asked and act != "no ranges":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        if act != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if act == "cut":
            share = content[start : start + min(300_000, len(content) // 2)]
            self.server.sent += len(share)
            return self.wfile.write(share)
        if act == "stall":
            self.wfile.write(content[start : start + 1000])
            self.wfile.flush()
            self.server.wake.wait(3)
            return None
        if act == "wrong":
            content = b"<html>" + content[6:]
            content = content[:-4] + b"html"
        if act == "slow":
            for place in range(start, len(content), 2000):
                if self.server.wake.wait(0.01):
                    break
                self.wfile.write(content[place : place + 2000])
                self.server.sent += len(content[place : place + 2000])
            return None
        self.server.sent += len(content) - start
        return self.wfile.write(content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.script, found.asked, found.files, found.requests = [], [], {}, []
        found.acts, found.tag, found.sent = {}, None, 0
        found.wake = threading.Event()
        found.url = f"http://127.0.0.1:{found.server_address[1]}/file"
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.wake.set()
        found.shutdown()
        thread.join()
