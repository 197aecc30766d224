"""What `herd serve` refuses before it loads anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from herdbook.errors import ServeError, UnknownName
from herdbook.serving.server import how_to_call, listen, serve
from herdbook.serving.setup import served_name


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("cria", "cria"),
        ("cria@2", "cria@2"),
        ("models/tiny", "tiny"),
        ("models/tiny/", "tiny"),
        ("tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("/a/b/tiny.gguf", "tiny"),
        ("hf:org/name", "org/name"),
    ],
)
def test_names(ref: str, name: str):
    assert served_name(ref) == name


def test_port_in_use(tiny_folder: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} on 127.0.0.1 cannot be opened") as error:
            serve([str(tiny_folder)], port=port)
        assert f"--port {port + 1}" in str(error.value)


def test_an_unknown_template_is_told_before_loading(tiny_folder: Path):
    with pytest.raises(UnknownName, match="template 'vicunna' is none that comes with Herdbook"):
        serve([str(tiny_folder)], port=0, template="vicunna")


def test_no_such_port(tiny_folder: Path):
    with pytest.raises(ServeError, match="port 65536 is none: ports go to 65535"):
        serve([str(tiny_folder)], port=65536)


def test_a_port_is_usable_again_at_once():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
    with listen("127.0.0.1", port):
        pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])
def test_other_machines_need_a_key(host: str, tiny_folder: Path):
    with pytest.raises(ServeError, match="there is no API key") as error:
        serve([str(tiny_folder)], host=host)
    assert "HERDBOOK_API_KEY" in str(error.value)


def test_no_such_host(tiny_folder: Path):
    with pytest.raises(ServeError, match="is no address here"):
        serve([str(tiny_folder)], host="256.1.1.1", key="s3cret", port=0)


def test_unknown_model(book):
    with pytest.raises(UnknownName):
        serve(["nobody"], book=book)


def test_two_models_of_one_name(tiny_folder: Path):
    with pytest.raises(ServeError, match="two models would be called"):
        serve([str(tiny_folder), f"{tiny_folder}/"])


def test_how_to_call_names_the_key_only_when_there_is_one():
    assert "Authorization" not in how_to_call("http://127.0.0.1:8000", "cria", False)
    assert "Authorization" in how_to_call("http://127.0.0.1:8000", "cria", True)
