"""The demo's command as a server, and what a visitor's browser sends to it."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tests.tiny_editor import write_run

ROOT = pathlib.Path(__file__).parents[1]
SAMPLING = dict(times=(1.0, 0.75, 0.5, 0.25), sampler="ddim", eta=1.0)


def editor(root: pathlib.Path) -> pathlib.Path:
    """A run to serve: a tiny one, written below `root`, or that of DEMO_CHECKPOINT."""
    if trained := os.environ.get("DEMO_CHECKPOINT"):
        return pathlib.Path(trained).resolve()
    return write_run(root, "package:pretrained/easyvqa/text_encoder", SAMPLING, scorer=True)


@contextlib.contextmanager
def serving(run: pathlib.Path, log: pathlib.Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of the page once it is served, and the process."""
    command = [sys.executable, "-m", "npedit_jax.demo", "--checkpoint", str(run)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"the page is at (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1].rstrip("/"), process
    finally:
        process.terminate()
        process.wait(30)


def png(image: Image.Image) -> bytes:
    """A picture as a file."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def upload(address: str, data: bytes) -> str:
    """Where the server has put a file."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
    return json.loads(post(address, "/gradio_api/upload", body, "multipart/form-data; boundary=x"))[0]


def post(address: str, path: str, body: bytes, kind: str = "application/json") -> bytes:
    """What the server answers."""
    request = urllib.request.Request(f"{address}{path}", body, {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def press(address: str, picture: dict[str, Any], words: str = "remove the circle") -> dict[str, Any]:
    """What comes of the button: `success` and `output`."""
    session = uuid.uuid4().hex
    picture = picture | {"meta": {"_type": "gradio.FileData"}}
    event = {"data": [picture, words, 0, False, None], "fn_index": 0, "session_hash": session}
    post(address, "/gradio_api/queue/join", json.dumps(event).encode())
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data:") and (found := json.loads(line[5:]))["msg"] == "process_completed":
                return found
    raise AssertionError("no answer")
