"""/v1/embeddings, and adapters that clients choose as models."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import herdbook
from herdbook.errors import FileError, ServeError, UnknownName
from herdbook.serving.api import app
from herdbook.serving.server import serve
from herdbook.serving.setup import Setup, named
from herdbook.serving.worker import Worker

from .conftest import Client


def ask(client: Client, given: Any, **keys: Any) -> Any:
    return client("POST", "/v1/embeddings", json={"model": "tiny", "input": given} | keys)


def refused(response: Any, status: int = 400) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def vectors(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data], dtype=np.float32)


def test_all_kinds_of_input(client: Client, tiny_folder: Path) -> None:
    model = herdbook.load(str(tiny_folder))
    texts = ["hello", "the cat", "你好吗", "hello"]
    ids = [model.tokenizer.encode(one, bos=model.tokenizer.add_bos) for one in texts]
    means = torch.stack([model.hidden(one).mean(0) for one in ids])
    assert np.allclose(model.embed(texts), means, atol=2e-2)  # bfloat16, shapes padded
    expected = torch.nn.functional.normalize(means).numpy()
    assert np.allclose(model.embed(texts, normalise=True), expected, atol=1e-2)
    assert np.allclose(model.embed("the cat"), means[1:2].numpy(), atol=1e-2)
    for given in (texts, ids):
        response = ask(client, given)
        assert np.allclose(vectors(response), expected, atol=1e-2)
        tokens = sum(map(len, ids))
        assert response.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for single in ("the cat", ids[1]):
        assert np.allclose(vectors(ask(client, single)), expected[1:2], atol=1e-2)


def test_more_texts_than_run_at_once(client: Client) -> None:
    texts = [f"text {n}" for n in range(70)]
    many = vectors(ask(client, texts))
    assert np.allclose(many[41], vectors(ask(client, texts[41]))[0], atol=1e-2)
    assert len(np.unique(many.round(4), axis=0)) == 70


def test_base64(client: Client) -> None:
    plain = ask(client, "hello", encoding_format="float").json()["data"][0]["embedding"]
    packed = ask(client, "hello", encoding_format="base64").json()["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), plain)


@pytest.mark.parametrize(
    ("given", "keys", "reason"),
    [
        (
            "x",
            {"dimensions": 12},
            "dimensions=12 is not what tiny has: its vectors have 64 numbers",
        ),
        (
            "x",
            {"encoding_format": "int8"},
            "'encoding_format': input should be 'float' or 'base64'",
        ),
        ([], {}, "'input': must be a string, a list of strings"),
        (["a", 1], {}, "'input': mixes kinds"),
        ([384], {}, "token id 384 is outside the vocabulary"),
        (["x"] * 2049, {}, "'input': "),
        ([1] * 5000, {}, "a prompt of 5000 tokens"),
        ("x", {"model": "other"}, "the model 'other' is not served here"),
    ],
)
def test_what_is_refused(client: Client, given: Any, keys: dict[str, Any], reason: str) -> None:
    assert reason in refused(ask(client, given, **keys), 404 if "model" in keys else 400)


def test_dimensions_that_the_model_has(client: Client) -> None:
    assert vectors(ask(client, "x", dimensions=64)).shape == (1, 64)


# -- adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, adapter: Path) -> Iterator[Client]:
    load = partial(Setup([]).engine, str(tiny_folder), None, {"luna": adapter})
    worker = Worker("tiny", load, adapters=["luna"])
    worker.start()
    yield Client(app({"tiny": worker.wait(60)}))
    worker.stop(grace_s=0)


def test_an_adapter_is_chosen_as_a_model(tuned: Client, adapter: Path) -> None:
    cards = tuned("GET", "/v1/models").json()["data"]
    assert [(one["id"], one.get("parent")) for one in cards] == [("tiny", None), ("luna", "tiny")]
    assert tuned("GET", "/v1/models/luna").json()["parent"] == "tiny"
    alone = herdbook.load(str(adapter))
    said = alone.generate("hello", max_tokens=12)
    for model, same in (("tiny", False), ("luna", True)):
        reply = tuned.complete("hello", model=model).json()
        assert reply["model"] == model
        assert (reply["choices"][0]["text"] == said) is same
        unit = vectors(ask(tuned, "hello", model=model))[0]
        theirs = alone.embed("hello", normalise=True)[0]
        assert np.allclose(unit, theirs, atol=1e-2) is same
    assert tuned.chat("hello", model="luna").status_code == 200
    assert "'tiny', 'luna'" in refused(tuned.chat("hello", model="lune"), 404)


def test_adapters_that_cannot_be_served(tiny_folder: Path, adapter: Path, home: Path) -> None:
    tiny = str(tiny_folder)
    with pytest.raises(ServeError, match="2 models with adapters"):
        serve([tiny, str(adapter)], adapters={"luna": str(adapter)})
    with pytest.raises(ServeError, match=f"would be called '{tiny_folder.name}'"):
        serve([tiny], adapters={tiny_folder.name: str(adapter)})
    with pytest.raises(FileError, match="is no adapter: it has no adapter_config"):
        serve([tiny], adapters={"luna": tiny})
    with pytest.raises(UnknownName, match="'nobody'"):
        serve([tiny], adapters={"luna": "nobody"})
    for wrong in ("luna", "=x", "luna="):
        with pytest.raises(ServeError, match="must be NAME=REF"):
            named([wrong])
    with pytest.raises(ServeError, match="each name once"):
        named(["a=x", "a=y"])
