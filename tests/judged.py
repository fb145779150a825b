"""What the tests of evals/judge.py share: run folders written by hand, and a chat server that does as it is told.

test_judge.py and test_sheet.py use it.
"""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kit import data, models

MEASURES = {"el10": 0.5, "ma": 0.5, "bleu": 0.5, "bertscore": 0.5, "entropy": 3.0}


def write_pairs(path, texts):
    """A pairs.jsonl of {id: (prefix, suffix)}."""
    side = {
        "learn_id": "n",
        "learn_context": "",
        "learn_prefix": "A van",
        "learn_suffix": " came.",
        "similarity": 0.5,
    }
    rows = [
        {"id": id, "context": "", "prefix": a, "suffix": b, **side} for id, (a, b) in texts.items()
    ]
    data.write_jsonl(path, rows)
    return path


def write_run(folder, pairs, said, *, method="icu", **config):
    """A finished run over a pairs file as icu.py leaves one; said: a dict {id: generation} for each epoch, from 0."""
    config = {
        "model": "m/before",
        "protocol": "paper",
        "pairs": str(pairs),
        "thresholds_used": {},
        **config,
    }
    data.write_json(
        folder / "config.json", config | {"sha256": {"pairs": models.fingerprint(pairs)}}
    )
    last = len(said) - 1
    summary = {
        "method": method,
        "protocol": "paper",
        "stopped": "forgotten",
        "epochs": last,
        "collapsed": False,
    }
    summary |= {"name": folder.name, "thresholds": {}, "before": MEASURES, "after": MEASURES}
    data.write_json(folder / "summary.json", summary)
    data.write_jsonl(
        folder / "metrics.jsonl", [{"epoch": e, "active": 1, **MEASURES} for e in range(last + 1)]
    )
    lines = [(epoch, id, text) for epoch, texts in enumerate(said) for id, text in texts.items()]
    rows = [{"epoch": epoch, "id": id, "generation": text, **MEASURES} for epoch, id, text in lines]
    data.write_jsonl(folder / "samples.jsonl", rows)
    return folder


class Chat:
    """A server on loopback: `behave(candidate, n)` says what becomes of the n-th request about a candidate, from 0.

    A str is the answer of the model; (status, headers, body) is sent as it is; a number is how many seconds nothing
    comes; None cuts the connection in the middle. `seen` has (time, headers, request) of all that came.
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
            request_queue_size = (
                64  # 5 would lose one of eight that come at once: a try that is never seen
            )

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
            self.seen.append((time.monotonic(), handler.headers, request))
            n = self.count[candidate] = self.count.get(candidate, -1) + 1
        do = self.behave(candidate, n)
        if isinstance(do, str):
            do = 200, {}, completion(do)
        if isinstance(do, int | float):
            time.sleep(do)
            do = None
        status, headers, body = do or (200, {}, completion("Final score: 9"))
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        ).items():
            handler.send_header(name, value)
        handler.end_headers()
        if do is None:
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.wfile.write(body)

    def asked(self, candidate):
        """The times at which a candidate was asked about."""
        return [at for at, _, request in self.seen if candidate_of(request) == candidate]


def candidate_of(request):
    """The candidate of a request of evals/judge.py."""
    line = next(
        line
        for line in request["messages"][1]["content"].split("\n")
        if line.startswith("Candidate: ")
    )
    return json.loads(line.removeprefix("Candidate: "))


def completion(answer, **more):
    """A chat completion as a server sends it."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": answer},
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    found = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-2026-01",
        "choices": [choice],
    }
    return found | {"usage": usage} | more
