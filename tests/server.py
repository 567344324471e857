"""A web server on this machine, for what is fetched: it knows ranges, and breaks off where it is told to."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """files: path -> bytes. cuts: path -> bytes after which an answer breaks off, once each. ranges: whether parts of a
    file are given. asked: (path, Range or None) of all requests. types: path -> content type."""

    def __init__(self, url):
        self.url, self.files, self.cuts, self.asked, self.types, self.ranges = url, {}, {}, [], {}, True


@contextmanager
def serving():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            if self.path not in site.files:
                self.send_error(404)
                return
            content, start = site.files[self.path], 0
            if wanted and site.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", site.types.get(self.path, "application/octet-stream"))
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            most = site.cuts.get(self.path, [])
            self.wfile.write(content[start : start + most.pop(0)] if most else content[start:])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
