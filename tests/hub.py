"""Local servers: any handler on the loopback address, and a stand-in for the Hugging Face hub."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

REPOSITORY, REVISION = "HuggingFaceFW/fineweb-edu", "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(handler, **state):
    """Serve requests with a handler, in a thread; state: attributes of the server, which has its `url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(state, url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def serve_model(files, repository):
    """Serve {path: bytes} as a model of the hub, as `serve_dataset` does."""
    return serve_dataset(files, repository=repository, kind="models")


def serve_dataset(files, faults=(), repository=REPOSITORY, revision=REVISION, kind="datasets"):
    """Serve {path: bytes} as a dataset of the hub. The server collects the requests in `asked`.

    faults: what the first requests get instead: "503", "429", "half" of a file; or "none": never a file.
    """

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlparse(self.path)
            path = urllib.parse.unquote(url.path)
            self.server.asked.append((self.command, path))
            fault = self.server.faults[0] if self.server.faults else ""
            if fault.isdigit():
                del self.server.faults[0]
                return self.reply(int(fault), b"", {})
            prefix = "/" if kind == "models" else f"/{kind}/"
            api, file = f"/api/{kind}/{repository}", f"{prefix}{repository}/resolve/"
            if path.startswith(f"{api}/tree/"):
                below = path.removeprefix(f"{api}/tree/{revision}").strip("/")
                self.reply_json(tree(f"{below}/" if below else "", "recursive=true" in url.query.lower()))
            elif path.startswith(f"{api}/paths-info/"):
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.reply_json([entry(name) for name in form.get("paths", []) if name in files])
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.reply_json({"id": repository, "sha": revision, "siblings": siblings, "private": False})
            elif path.startswith(file) and path.removeprefix(file).partition("/")[2] in files:
                content = files[path.removeprefix(file).partition("/")[2]]
                if fault == "none" and self.command == "GET":
                    return self.reply(503, b"", {})
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": revision}
                self.reply(200, content, headers, torn=fault == "half" and self.command == "GET")
            else:
                unknown = path.startswith("/api/") and not path.startswith(api)
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound" if unknown else "EntryNotFound"})

        do_HEAD = do_POST = do_GET

        def reply_json(self, value):
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def reply(self, status, content, headers, torn=False):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if torn:
                del self.server.faults[0]
                content = content[: len(content) // 2]
                self.close_connection = True
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    def entry(name):
        oid = hashlib.sha1(files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}

    def tree(below, recursive):
        names = [name for name in files if name.startswith(below)]
        if recursive:
            return [entry(name) for name in names]
        folders = {below + name.removeprefix(below).partition("/")[0] for name in names} - set(names)
        return [{"type": "directory", "path": folder, "size": 0, "oid": ""} for folder in sorted(folders)] + [
            entry(name) for name in names if "/" not in name.removeprefix(below)
        ]

    return serve(Hub, asked=[], faults=list(faults))


def environment(server, folder):
    """The variables that make a script use the server as the hub, with an empty cache in the folder."""
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
