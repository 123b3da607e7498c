"""The page of the demo against visitors who mean harm: where it listens, what it takes, and what it gives away."""

import signal
import socket
import urllib.error
import urllib.request

import pytest
from PIL import Image

from tests import demo_server
from tests.demo_server import ROOT, png, post, press, upload
from tests.evaluation import vie_server

pytest.importorskip("gradio")


def _status(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(address + path, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_on_this_machine_alone(demo_address):
    assert demo_address.startswith("http://127.0.0.1:")
    port = int(demo_address.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):  # as any other address of the machine
        socket.create_connection(("127.0.0.2", port), timeout=10)


def test_no_file_of_the_machine_is_served(demo_address, demo_run):
    assert _status(demo_address, "/") == 200
    for path in (
        "/etc/passwd",
        str(ROOT / "setup.py"),
        "setup.py",
        str(demo_run / "config.json"),
        "../../../etc/passwd",
    ):
        assert _status(demo_address, f"/gradio_api/file={path}") in (403, 404), path


def test_upload_that_is_too_large_is_refused(demo_address):
    assert upload(demo_address, bytes(1000))
    words = b'{"data": ["data:image/png;base64,' + b"A" * 25_000_000 + b'"]}'
    for send in (
        lambda: upload(demo_address, bytes(20_500_000)),
        lambda: post(demo_address, "/gradio_api/queue/join", words),  # a picture within the words that are sent
    ):
        with pytest.raises((urllib.error.URLError, ConnectionError)) as refused:
            send()
        # The answer, or the connection's end before all is sent.
        assert getattr(refused.value, "code", 413) == 413 and _status(demo_address, "/") == 200


def test_picture_with_too_many_pixels_is_told(demo_address):
    answer = press(demo_address, {"path": upload(demo_address, png(Image.new("1", (9000, 9000))))})
    assert not answer["success"] and "more than 67108864 pixels" in answer["output"]["error"]


def test_only_what_was_uploaded_is_edited(demo_address, tmp_path):
    """Neither a file of the machine nor an address that it can reach."""
    (tmp_path / "secret.png").write_bytes(png(Image.new("RGB", (64, 64), "red")))
    with vie_server.serving(lambda number, content: (200, "")) as other:
        inside = other.url.removesuffix("/v1") + "/secret.png"
        for picture in (
            {"path": str(tmp_path / "secret.png")},
            {"path": inside},
            {"path": inside, "url": inside},
            {"path": f"{upload(demo_address, b'x')}/../../../../../../..{tmp_path}/secret.png"},
        ):
            assert not press(demo_address, picture)["success"], picture
        assert other.requests == [] and other.paths == []


def test_its_folder_is_gone_when_it_is_ended(demo_run, tmp_path):
    with demo_server.serving(demo_run, tmp_path / "log", TMPDIR=str(tmp_path)) as (_, process):
        assert list(tmp_path.glob("npedit-demo-*"))
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("npedit-demo-*"))
