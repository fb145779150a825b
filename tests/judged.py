"""What tests of pages and judges share: run folders written by hand, a chat server, a browser."""

import contextlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kit import data, models

MEASURES = {"el10": 0.5, "ma": 0.5, "bleu": 0.5, "bertscore": 0.5, "entropy": 3.0}
LEARN = {"learn_id": "n", "learn_prefix": "A van", "learn_suffix": " came.", "similarity": 0.5}
LEARN |= {"context": "", "learn_context": ""}


def write_run(folder, texts, generations, *, method="icu", **config):
    """A finished run as icu.py leaves one, over a pairs.jsonl beside it.

    texts: {id: (prefix, suffix)}; generations: a dict {id: generation} for each epoch, from 0.
    """
    pairs, epochs = folder.parent / "pairs.jsonl", len(generations) - 1
    rows = [{"id": id, "prefix": a, "suffix": b, **LEARN} for id, (a, b) in texts.items()]
    data.write_jsonl(pairs, rows)
    sha256 = {"pairs": models.fingerprint(pairs)}
    both = {"protocol": "paper", "pairs": str(pairs), "sha256": sha256}
    data.write_json(folder / "config.json", {"model": "m/before", **both, **config})
    ends = {"stopped": "forgotten", "collapsed": False, "before": MEASURES, "after": MEASURES}
    summary = {"method": method, "protocol": "paper", "epochs": epochs, "thresholds": {}, **ends}
    data.write_json(folder / "summary.json", summary)
    metrics = [{"epoch": epoch, "active": 1, **MEASURES} for epoch in range(epochs + 1)]
    data.write_jsonl(folder / "metrics.jsonl", metrics)
    rows = [
        {"epoch": epoch, "id": id, "generation": text, **MEASURES}
        for epoch, of_epoch in enumerate(generations)
        for id, text in of_epoch.items()
    ]
    data.write_jsonl(folder / "samples.jsonl", rows)
    return folder


class Chat:
    """A server on loopback: `behave(candidate, n)` is what becomes of the n-th request about one.

    The model's answer as a str, (status, headers, body), or seconds of silence. `seen` has
    (headers, request) of all that came, `count` the last n.
    """

    def __init__(self, behave):
        self.behave, self.seen, self.count, self.lock = behave, [], {}, threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    chat.reply(self, request)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # 5 would lose one of eight that come at once

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, handler, request):
        candidate = candidate_of(request)
        with self.lock:
            self.seen.append((handler.headers, request))
            n = self.count[candidate] = self.count.get(candidate, -1) + 1
        reply = self.behave(candidate, n)
        if isinstance(reply, int | float):
            return time.sleep(reply)
        status, headers, body = (200, {}, completion(reply)) if isinstance(reply, str) else reply
        content = json.dumps(body).encode()
        handler.send_response(status)
        length = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (length | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)


def data_of(page):
    """The JSON in the first script element of a page."""
    return json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def candidate_of(request):
    """The candidate of a request of evals/judge.py."""
    lines = request["messages"][1]["content"].split("\n")
    (line,) = (line for line in lines if line.startswith("Candidate: "))
    return json.loads(line.removeprefix("Candidate: "))


def completion(answer, **choice):
    """A chat completion as a server sends it."""
    choices = [{"message": {"role": "assistant", "content": answer}, **choice}]
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return {"model": "judge-2026-01", "choices": choices, "usage": usage}


@contextlib.contextmanager
def chromium():
    """A browser without a window; skips where there is none."""
    reason = "no browser: pip install playwright; apt-get install chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        path = shutil.which(driver.chromium.executable_path) or shutil.which("chromium")
        if path is None:
            pytest.skip(reason)
        with driver.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
            yield browser
