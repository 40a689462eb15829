"""A small OpenAI-compatible server for tests: it answers token ids by a fixed function, and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import PreTrainedTokenizerBase

Reply = Callable[[list[int]], dict[str, Any]]  # prompt ids -> choice, or {"error": ..., "code": ...}


class FakeServer(ThreadingHTTPServer):
    """Serves /v1/models and /v1/completions on a free port while its `with` block lasts.

    Attributes:
        requests: bodies of the completions asked for, in order.
        num_answered: completions that were answered with a choice.
        most_under_way: completions that were under way at the same time, at most.
    """

    daemon_threads = True

    def __init__(
        self,
        reply: Reply,
        *,
        models: tuple[dict[str, Any], ...] = ({"id": "target"},),
        fault: Callable[[int], int | str | None] = lambda number: None,
        seconds: float = 0.0,
    ):
        """`fault` names what befalls request number n: an HTTP code, "hang", "drop" or "abort". `seconds` it takes."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.models, self.fault, self.seconds = reply, models, fault, seconds
        self.requests: list[dict[str, Any]] = []
        self.credentials: list[str] = []  # header `Authorization` of each
        self.num_answered = self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Ids of every prompt asked, in order."""
        return [tuple(request["prompt"]) for request in self.requests]

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Stop listening and cut every connection off, as a killed process does."""
        if not self.over.is_set():
            self.over.set()
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"object": "model", **model} for model in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.credentials.append(self.headers["Authorization"])
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._answer(server.fault(number), server.reply(body["prompt"]))
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, fault: int | str | None, choice: dict[str, Any]) -> None:
        server = self.server
        server.over.wait(server.seconds if fault != "hang" else 60)
        if server.over.is_set() or fault == "drop":
            self.close_connection = True
        elif isinstance(fault, int):
            self._send(fault, {"error": {"message": f"fault {fault}", "code": fault}})
        elif "error" in choice:
            self._send(choice["code"], {"error": {"message": choice["error"], "code": choice["code"]}})
        else:
            choice = choice | ({"finish_reason": "abort"} if fault == "abort" else {})
            with server.lock:
                server.num_answered += 1
            self._send(200, {"id": "1", "object": "text_completion", "model": "x", "choices": [{"index": 0, **choice}]})

    def _send(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps({"created": int(time.time()), **value}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def scripted(tokenizer: PreTrainedTokenizerBase) -> Reply:
    """Replies told by the last question: `refuse`, `cut` and `empty` do that, others get a text of their own."""

    def reply(prompt: list[int]) -> dict[str, Any]:
        question = tokenizer.decode(prompt).split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        if "refuse" in question:
            return {"error": "your prompt is too long", "code": 400}
        text = "" if "empty" in question else f"answer {sum(prompt)} to {question}"
        ids = tokenizer(text)["input_ids"]
        if "cut" in question:
            return {"text": text, "token_ids": ids, "finish_reason": "length"}
        return {"text": text, "token_ids": [*ids, tokenizer.eos_token_id], "finish_reason": "stop"}

    return reply
