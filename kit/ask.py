"""Asking a language model behind an OpenAI-compatible endpoint: who may be asked, the key, the cache of its answers.

evals/judge.py uses it. What is asked may hold texts that somebody asked to have forgotten, so a server on this machine is
asked directly (no proxy), and no redirect is followed. The key is read from the environment; it goes into the header of
a request and nowhere else: what a server says is written and shown only with the key taken out.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import socket
import threading
from urllib.parse import urlsplit

from kit import data
from kit.flags import first_line

KEY = "JUDGE_API_KEY"
FATAL = (301, 302, 303, 307, 308, 401, 403, 404, 405)  # HTTP: no other request would fare better


class NoAnswer(Exception):
    """The server gave no answer to one request, after every try."""


class Refused(NoAnswer):
    """The server will not answer this request, whatever it does to others: a filter, too long a text."""


# --- who is asked ---


def check_base_url(base_url):
    """ValueError unless it is a plain http address, without a name and password or signs that readers differ on."""
    try:
        url = urlsplit(base_url)
        fits = url.scheme in ("http", "https") and url.hostname and (url.port or 1)
    except ValueError:
        fits = False
    if (
        not fits
        or not base_url.isascii()
        or not base_url.isprintable()
        or {"@", "\\", " ", "?", "#"} & set(base_url)
    ):
        raise ValueError(f"--base-url {base_url}: not an address such as http://localhost:8000/v1")


def is_loopback(base_url):
    """Whether a server is on this machine: 127.0.0.1 and its like, ::1, or localhost where it means these.

    Another name may mean another machine by the time it is asked, so whatever it means now, it is none.
    """
    host, found = urlsplit(base_url).hostname, []
    with contextlib.suppress(OSError):
        found = (
            [info[4][0] for info in socket.getaddrinfo(host, None)]
            if host == "localhost"
            else [host]
        )
    try:
        return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)
    except ValueError:
        return False


def key_for(base_url):
    """The key in the environment, or, for a server on this machine, a word in its place. ValueError, without the key,
    for one that no header can carry.
    """
    key = os.environ.get(KEY)
    if not key and is_loopback(base_url):
        return "none"
    if not key:
        raise ValueError(
            f"{base_url} wants a key: put it into the environment as {KEY} (if it wants none: 8 letters)"
        )
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{KEY}: no key (8 or more visible ASCII characters)")
    return key


class Endpoint:
    """One model at one address. `ask` may be called by several threads."""

    def __init__(self, base_url, model, *, timeout, tries):
        import openai  # 0.4 s that only those who ask wait for

        self.base_url, self.model, self.key = base_url, model, key_for(base_url)
        client = openai.DefaultHttpxClient(
            follow_redirects=False, trust_env=not is_loopback(base_url)
        )
        # It waits as Retry-After says (up to two minutes) or longer each time, after 408, 409, 429, 5xx and where no
        # connection or no answer came.
        self.client = openai.OpenAI(
            base_url=base_url,
            api_key=self.key,
            timeout=timeout,
            max_retries=tries - 1,
            http_client=client,
        )

    def without_key(self, text):
        return text.replace(self.key, "[key]") if len(self.key) >= 8 else text

    def ask(self, request):
        """One request -> {"answer": text or None, "model": who answers, "in", "out": tokens}.

        None where what came is no chat completion. NoAnswer: the server failed, try after try, or refuses this one.
        ValueError: it refuses whatever it is asked.
        """
        import openai

        try:
            reply, why = self.client.chat.completions.create(**request), None
        except openai.APIStatusError as error:
            why = self.without_key(f"HTTP {error.status_code}: {first_line(error)}")[:200]
            if error.status_code in FATAL:
                raise ValueError(f"{self.base_url} refuses {self.model}: {why}") from None
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise Refused(why) from None
        except openai.APIConnectionError as error:  # also a timeout
            why = self.without_key(first_line(error.__cause__ or error) or type(error).__name__)[
                :200
            ]
        except (
            openai.OpenAIError,
            ValueError,
            RecursionError,
        ):  # what should be JSON is none, or is nested too deep
            reply, why = None, None
        if why:
            raise NoAnswer(why)
        return self.read(reply)

    def read(self, reply):
        """What `ask` returns; nothing in a reply is believed to be there."""
        choices, usage = getattr(reply, "choices", None), getattr(reply, "usage", None)
        message = (
            getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        )
        answer = getattr(message, "content", None)
        tokens = {}
        for name, field in (("in", "prompt_tokens"), ("out", "completion_tokens")):
            count = getattr(usage, field, None)
            tokens[name] = count if type(count) is int and 0 <= count < 1e9 else 0
        if message is not None and answer is None:
            answer = ""  # an empty choice
        answer = self.sound(answer) if isinstance(answer, str) else None
        model = getattr(reply, "model", None)
        return {
            "answer": answer,
            "model": self.sound(model) if isinstance(model, str) else "",
            **tokens,
        }

    def sound(self, text):
        """A server's text without the key, and as UTF-8 can hold it: JSON can spell half a surrogate pair."""
        return self.without_key(text).encode("utf-8", "replace").decode()


# --- the cache ---


def key_of(base_url, request):
    """sha256 of everything that is sent and of where to: 64 hex digits."""
    return hashlib.sha256(json.dumps([base_url, request], sort_keys=True).encode()).hexdigest()


class Cache:
    """Answers by `key_of`, in a file of JSON lines that grows by a line an answer, whatever ends the program."""

    def __init__(self, path):
        self.path, self.found, self.lock, self.whole = path, {}, threading.Lock(), True
        data = path.read_bytes() if path.is_file() else b""
        self.whole = data.endswith(b"\n") or not data
        for line in data.decode("utf-8", "replace").split("\n"):
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # a line that was cut off is asked again
                row = json.loads(line)
                if isinstance(row, dict) and fits(row):
                    self.found[row["key"]] = {
                        name: row[name] for name in ("answer", "model", "in", "out")
                    }

    def __contains__(self, key):
        return key in self.found

    def get(self, key):
        return self.found.get(key)

    def put(self, key, reply):
        line = data.json_bytes({"key": key, **reply})
        with self.lock:
            self.found[key] = reply
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(
                    line if self.whole else b"\n" + line
                )  # one write: lines of several processes do not mix
                self.whole = True


def fits(row):
    """Whether a line of the cache is one that `put` writes."""
    texts = all(isinstance(row.get(name), str) for name in ("key", "answer", "model"))
    return texts and all(type(row.get(name)) is int and row[name] >= 0 for name in ("in", "out"))
