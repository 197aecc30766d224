from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.tokens.bytebpe import CUTS
from herdbook.tokens.sentence import PieceModel
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata, piece_metadata

BYTE = 3  # id of byte 0 in both small tokenizers
HELLO, SPACE_HELLO, SPACE_W, OR = 262, 263, 264, 265


def spell(text: str) -> list[int]:
    return [BYTE + byte for byte in text.encode()]


def test_byte_bpe_merges_by_rank(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("Hello world") == [HELLO, SPACE_W, OR, *spell("ld")]
    assert byte_tokenizer.encode(" Hello") == [SPACE_HELLO]
    assert byte_tokenizer.encode("") == []
    assert byte_tokenizer.encode("Hello", bos=True) == [1, HELLO]
    assert byte_tokenizer.size == 266


def test_special_text_is_plain_unless_asked(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("Hello<|im_end|>") == [HELLO, *spell("<|im_end|>")]
    assert byte_tokenizer.encode("Hello<|im_end|>", specials=True) == [HELLO, 2]
    assert byte_tokenizer.encode("Hello<|im_end|>") == [HELLO, *spell("<|im_end|>")]


def test_both_readings_at_once_from_several_threads(byte_tokenizer: Tokenizer) -> None:
    wrong: list[object] = []

    def work(specials: bool, expected: list[int]) -> None:
        for _ in range(300):
            got = byte_tokenizer.encode("<|im_end|>" * 3, specials=specials)
            if got != expected:
                wrong.append(got)

    cases = [(True, [2] * 3), (False, spell("<|im_end|>" * 3))] * 2
    threads = [threading.Thread(target=work, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_digits_are_cut_as_the_name_says() -> None:
    metadata = byte_metadata()
    metadata["tokenizer.ggml.merges"] = ["1 2", "12 3", "Ġ 1"]
    metadata["tokenizer.ggml.tokens"] += ["12", "123", "Ġ1"]
    metadata["tokenizer.ggml.token_type"] += [1, 1, 1]
    ids = {}
    for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2"):
        tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}, Path("x.gguf"))
        ids[pre] = [len(tokenizer.encode("1234")), len(tokenizer.encode(" 123"))]
    assert ids == {"smollm": [4, 4], "gpt-2": [2, 2], "llama-bpe": [2, 2], "qwen2": [4, 4]}


def test_sentencepiece_prefix_bytes_and_ties(piece_tokenizer: Tokenizer) -> None:
    space, h, i, a, b, _, hi, ab, ba = range(259, 268)
    assert piece_tokenizer.encode("hi") == [hi]
    assert piece_tokenizer.encode(" hi") == [space, hi]
    assert piece_tokenizer.encode("hé") == [264, *spell("é")]
    assert piece_tokenizer.encode("</s>") == [space, *spell("<"), 274, *spell("s>")]
    # "ab" and "ba" score the same: the leftmost wins, whichever it is
    assert piece_tokenizer.encode("aba") == [space, ab, a]
    assert piece_tokenizer.encode("bab") == [space, ba, b]
    assert piece_tokenizer.encode("hi</s>hi", specials=True) == [hi, 2, hi]
    assert (h, i) == (260, 261)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_spans_cover_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    end = tokenizer.token_bytes(2).decode()
    text = f"hi 🦙{end} [é"
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text, specials=True)
    assert (text.index(end), text.index(end) + len(end)) == spans[ids.index(2)]
    covered = {place for a, b in spans for place in range(a, b)}
    assert covered == set(range(len(text)))
    assert spans == sorted(spans)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_protected_spans_are_not_parsed(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    end = tokenizer.token_bytes(2).decode()
    text = f"{end}{end}{end}"
    size = len(end)
    ids, _ = tokenizer.encode_spans(text, [(size, 2 * size)])
    assert (ids[0], ids[-1], ids.count(2)) == (2, 2, 2)
    assert tokenizer.decode(ids, specials=True).replace(" ", "") == text
    # half of one is enough
    ids, _ = tokenizer.encode_spans(text, [(size + 1, size + 2)])
    assert ids.count(2) == 2
    ids, _ = tokenizer.encode_spans(text, [(size - 1, size + 1)])
    assert ids.count(2) == 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 274), max_size=30), st.booleans())
@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_stream_equals_decode(
    kind: str, request: pytest.FixtureRequest, ids: list[int], specials: bool
) -> None:
    tokenizer = request.getfixturevalue(kind)
    stream = tokenizer.stream(specials=specials)
    parts = [stream.push(id) for id in ids] + [stream.flush()]
    assert "".join(parts) == tokenizer.decode(ids, specials=specials)
    # against the plain definition: all bytes at once
    kept = [id for id in ids if specials or id not in tokenizer.special_ids]
    data = [tokenizer.token_bytes(id) for id in kept if tokenizer.token_bytes(id)]
    if kind == "piece_tokenizer" and data:
        data[0] = data[0].removeprefix(b" ")
    assert "".join(parts) == b"".join(data).decode("utf-8", errors="replace")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_decode_undoes_encode(kind: str, request: pytest.FixtureRequest, text: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    if kind == "piece_tokenizer" and "▁" in text:
        return  # SentencePiece's own space; it cannot be told from " "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))


def test_stream_emits_whole_characters_only(byte_tokenizer: Tokenizer) -> None:
    stream = byte_tokenizer.stream()
    assert [stream.push(id) for id in spell("é🦙!")] == ["", "é", "", "", "", "🦙", "!"]
    assert stream.flush() == ""
    assert stream.push(spell("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_token_bytes(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.token_bytes(SPACE_HELLO) == b" Hello"
    assert byte_tokenizer.token_bytes(BYTE + 0xF0) == b"\xf0"
    assert byte_tokenizer.token_bytes(2) == b"<|im_end|>"
    assert byte_tokenizer.token_bytes(9999) == b""
    assert piece_tokenizer.token_bytes(265) == b" hi"
    assert piece_tokenizer.token_bytes(BYTE + 0xF0) == b"\xf0"


def test_stop_ids_are_what_ends_a_turn(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.stop_ids == {0, 2}  # <|endoftext|>, <|im_end|>
    extra = byte_metadata() | {"tokenizer.ggml.eot_token_id": 5}
    assert Tokenizer.from_gguf(extra, Path("x.gguf")).stop_ids == {0, 2, 5}


def test_turn_delimiters_count_as_special_even_if_called_ordinary() -> None:
    metadata = byte_metadata()
    metadata["tokenizer.ggml.token_type"][1] = 4  # <|im_start|>, user-defined
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert 1 not in tokenizer.encode("<|im_start|>")
    assert tokenizer.encode("<|im_start|>", specials=True) == [1]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_saved_folder_reads_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    assert Tokenizer.exists(tmp_path)
    again = Tokenizer.load(tmp_path)
    for name in ("size", "bos_id", "eos_id", "stop_ids", "special_ids", "add_bos", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    for text in ("", "hi", "  hi é🦙", "Hello world 123", "<|im_end|></s><s>"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, specials=True) == tokenizer.encode(text, specials=True)
        assert again.decode(tokenizer.encode(text)) == text
    again.save(tmp_path / "twice")
    first, second = (tmp_path / "tokenizer.json", tmp_path / "twice" / "tokenizer.json")
    assert first.read_bytes() == second.read_bytes()


def test_saved_sentencepiece_model_reads_back(piece_tokenizer: Tokenizer, tmp_path: Path) -> None:
    piece_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = Tokenizer.load(tmp_path)
    assert again.encode("hi aba</s>", specials=True) == piece_tokenizer.encode(
        "hi aba</s>", specials=True
    )
    assert (again.bos_id, again.eos_id, again.add_bos) == (1, 2, True)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "falcon", "deepseek-v3"])
def test_gguf_metadata_survives_a_tokenizer_json(pre: str, tmp_path: Path) -> None:
    before = Tokenizer.from_gguf(byte_metadata(pre), Path("x.gguf"))
    before.save(tmp_path)
    metadata = Tokenizer.load(tmp_path).gguf_metadata()
    for key, value in before.gguf_metadata().items():
        assert metadata[key] == value, key


def test_gguf_metadata_of_pieces(piece_tokenizer: Tokenizer, tmp_path: Path) -> None:
    piece_tokenizer.save(tmp_path)
    back = Tokenizer.from_gguf(Tokenizer.load(tmp_path).gguf_metadata(), Path("x.gguf"))
    (tmp_path / "tokenizer.json").unlink()
    proto = Tokenizer.from_gguf(Tokenizer.load(tmp_path).gguf_metadata(), Path("x.gguf"))
    for text in ("hi", " hi é", "</s><s>"):
        for specials in (False, True):
            expected = piece_tokenizer.encode(text, specials=specials)
            assert back.encode(text, specials=specials) == expected
            assert proto.encode(text, specials=specials) == expected


def test_gguf_metadata_pads_to_the_embedding(byte_tokenizer: Tokenizer) -> None:
    metadata = byte_tokenizer.gguf_metadata(rows=268)
    assert metadata["tokenizer.ggml.tokens"][-2:] == ["[PAD266]", "[PAD267]"]
    assert metadata["tokenizer.ggml.token_type"][-2:] == [5, 5]
    assert len(byte_tokenizer.gguf_metadata()["tokenizer.ggml.tokens"]) == 266


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    gguf.write(path, byte_metadata(), [])
    assert Tokenizer.exists(path)
    assert Tokenizer.load(path).encode("Hello") == [HELLO]
    path.rename(tmp_path / "model.gguf")
    assert Tokenizer.exists(tmp_path)
    assert Tokenizer.load(tmp_path).encode("Hello") == [HELLO]


def test_configuration_beside_tokenizer_json(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<|endoftext|>"}
    config["chat_template"] = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D"},
    ]
    config["auto_map"] = {"AutoTokenizer": ["x.py", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.chat_template) == (0, "D")
    assert tokenizer.stop_ids == {0, 2, 7}
    tokenizer.save(tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).chat_template == "J"


def test_added_tokens_beside_a_model_file(piece_tokenizer: Tokenizer, tmp_path: Path) -> None:
    piece_tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    size = piece_tokenizer.size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 1}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.size == size + 2
    assert tokenizer.encode("hi<pad>", specials=True) == [265, size + 1]


# --- what is refused


def message(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        Tokenizer.load(path)
    return str(caught.value)


def test_no_tokenizer_says_what_is_needed(tmp_path: Path) -> None:
    assert not Tokenizer.exists(tmp_path)
    assert "holds no tokenizer (tokenizer.json, tokenizer.model or model.gguf)" in message(tmp_path)
    assert "is not there" in message(tmp_path / "nothing.gguf")
    path = tmp_path / "bare.gguf"
    gguf.write(path, {"general.architecture": "llama"}, [])
    assert not Tokenizer.exists(path)
    assert "no tokenizer.ggml.tokens" in message(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": "1.0"')
    assert "is no tokenizer.json that" in message(tmp_path)
    broken.unlink()
    model = tmp_path / "tokenizer.model"
    good = PieceModel(["<unk>", "a"], [0.0, 0.0], [2, 1]).serialise()
    for data in (b"", b"\x80\x03}q\x00.", good[:-1], b"\xff" * 40):
        model.write_bytes(data)
        assert "is no SentencePiece model" in message(tmp_path)
    model.write_bytes(good)
    assert Tokenizer.load(tmp_path).size == 2
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "holds no JSON object" in message(tmp_path)


def test_unknown_ways_are_refused_by_name() -> None:
    with pytest.raises(FileError, match=r"'smolm' is no way of cutting[^$]*did you mean 'smollm'"):
        Tokenizer.from_gguf(byte_metadata("smolm"), Path("x.gguf"))
    with pytest.raises(FileError, match="'bert' is not a kind of tokenizer"):
        Tokenizer.from_gguf(byte_metadata() | {"tokenizer.ggml.model": "bert"}, Path("x.gguf"))
    with pytest.raises(FileError, match="2 token types for 266 tokens must be as many"):
        Tokenizer.from_gguf(byte_metadata() | {"tokenizer.ggml.token_type": [1, 1]}, Path("x.gguf"))
    with pytest.raises(FileError, match="do not fit its tokens"):
        Tokenizer.from_gguf(byte_metadata() | {"tokenizer.ggml.merges": ["X Y"]}, Path("x.gguf"))


def test_unknown_cutting_cannot_become_gguf(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    source = json.loads(text)
    source["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,7}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(FileError, match="GGUF has no name for it"):
        Tokenizer.load(tmp_path).gguf_metadata()


def test_word_pieces_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    library = Library(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    assert "tokens are no bytes" in message(tmp_path)


def test_every_way_of_cutting_compiles(byte_tokenizer: Tokenizer) -> None:
    for pre in CUTS:
        tokenizer = Tokenizer.from_gguf(byte_metadata(pre, None), Path("x.gguf"))
        text = "Hello's W0rld 12345\r\n\n  你好, МИР! $5 `x`  "
        assert tokenizer.decode(tokenizer.encode(text)) == text, pre


def test_pieces_without_prefix() -> None:
    metadata = piece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert tokenizer.encode("hi") == [260, 261]
    assert tokenizer.decode([265]) == " hi"


def test_a_space_put_before_the_beginning_only(tmp_path: Path) -> None:
    """Metaspace with prepend_scheme "first", as newer LLaMA files have it: also around plain spans."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE({"▁": 0, "a": 1, "</s>": 2, "<": 3, "/": 4, "s": 5, ">": 6}, []))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a</s>a", specials=True) == [0, 1, 2, 1]
    ids, spans = tokenizer.encode_spans("a</s>a</s>", [(6, 10)])
    assert ids == [0, 1, 2, 1, 3, 4, 5, 6]
    assert spans[-5:] == [(5, 6), (6, 7), (7, 8), (8, 9), (9, 10)]
    assert tokenizer.decode(ids, specials=True) == "a</s>a</s>"


def test_ids_of_added_tokens_must_follow_one_another(tmp_path: Path) -> None:
    Tokenizer.from_gguf(byte_metadata(), Path("x.gguf")).save(tmp_path)
    source = json.loads((tmp_path / "tokenizer.json").read_text())
    token = source["added_tokens"][0] | {"content": "<far>", "id": 999}
    source["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    assert "'<far>' with id 999 would be read as 266" in message(tmp_path)
