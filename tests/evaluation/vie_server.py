"""A stand-in for an OpenAI-compatible endpoint: grades by rule, and fails when told to."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """`reply` makes (status, answer) of the request's number and content; bytes are the whole body, a dict an error.

    `requests` and `paths` are those that came.
    """

    def __init__(self, reply: Callable[[int, list[dict[str, Any]]], tuple[int, str | bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.paths, self.lock = reply, [], [], threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    """Chat completions."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            number = len(self.server.requests)
        status, answer = self.server.reply(number, request["messages"][0]["content"])
        message = {"role": "assistant", "content": answer}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        whole = body if status == 200 else {"error": answer if isinstance(answer, dict) else {"message": answer}}
        data = answer if isinstance(answer, bytes) else json.dumps(whole).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """Nothing is to be had; `paths` tells what was asked for."""
        self.server.paths.append(self.path)
        self.send_error(404)

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def serving(reply: Callable[[int, list[dict[str, Any]]], tuple[int, str | bytes]]) -> Iterator[Server]:
    """A server in a thread of its own."""
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def good(number: int, content: list[dict[str, Any]]) -> tuple[int, str]:
    """Grades that tell the two questions apart: 9 and 4 with two pictures, 8 and 9 with one."""
    pictures = sum(part["type"] == "image_url" for part in content)
    score = [9, 4] if pictures == 2 else [8, 9]
    return 200, "Surely:\n```json\n" + json.dumps({"score": score, "reasoning": "as seen"}) + "\n```"
