"""CPM-Bee against a plain computation of its own formulas: no library of today runs the original.

`plain` below takes the tree as a dictionary and the weights under their published names; it shares no
code with the model. One document, loops instead of batches, every mask and bias written out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import herdbook
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FamilyError, FileError, RequestError
from herdbook.model.carried import Carried
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_hf
from herdbook.model.cpm_bee import CPMBee
from herdbook.model.families import families
from herdbook.model.layout import Packed
from herdbook.model.modules import build
from herdbook.model.own_configs import Marks
from herdbook.model.tree import flatten, parse

VOCAB, HIDDEN, HEADS, DIM, FFN, LAYERS = 90, 32, 4, 10, 48, 3
CONFIG: dict[str, Any] = {
    "model_type": "cpmbee",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "dim_head": DIM,
    "dim_ff": FFN,
    "position_bias_num_buckets": 32,
    "position_bias_num_segment_buckets": 80,
    "position_bias_max_distance": 64,
}
PRUNED = {"mask_modules": [[True, False], [False, True], [False, False]]}
BOS, EOS, ROOT, ANS, MASK = 6, 7, 8, 9, 2


# --- the plain computation -------------------------------------------------------------------------


def letters(text: str) -> list[tuple[int, int]]:
    """(token, number) of a text whose words are numbers or <mask_k>."""
    found = []
    for word in text.split():
        kind, _, k = word.strip("<>").partition("_")
        found.append(
            (MASK, int(k)) if kind == "mask" else (ANS if word == "<ans>" else int(word), 0)
        )
    return found


def rows_of(data: Any) -> list[dict[str, Any]]:
    """Every token: its id, number, segment, whether it is context; segments know their way from the root."""
    rows: list[dict[str, Any]] = []
    paths: list[list[int]] = []

    def segment(content: list[tuple[int, int]], path: list[int], predict: bool) -> list[int]:
        mine = [*path, len(paths)]
        paths.append(mine)
        tokens = [(BOS, 0), *content] + ([] if predict else [(EOS, 0)])
        for token, number in tokens:
            rows.append({"id": token, "sub": number, "path": mine, "context": not predict})
        return mine

    def walk(value: Any, path: list[int], predict: bool) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                mine = segment(letters(key), path, False)
                walk(inner, mine, predict or (key == "<ans>" and len(path) == 1))
        else:
            segment(letters(value), path, predict)

    walk(data, segment([(ROOT, 0)], [], False), False)
    return rows


def plain(data: Any, w: dict[str, Tensor], said: list[int] = []) -> Tensor:  # noqa: B006
    """Logits [T, vocab] of the tree's tokens and those said behind them."""
    rows = rows_of(data)
    rows += [rows[-1] | {"id": id, "sub": 0} for id in said]
    n = len(rows)

    def bucket(distance: int) -> int:  # T5's, both ways: 32 buckets, 64 the distance of the last
        first, distance = (16, distance) if distance > 0 else (0, -distance)
        if distance < 8:
            return first + distance
        return first + min(8 + int(math.log(distance / 8) / math.log(64 / 8) * 8), 15)

    bias = torch.full((HEADS, n, n), float("-inf"))
    table = w["cpmbee.position_bias.relative_attention_bias"]
    for q, one in enumerate(rows):
        for k, other in enumerate(rows):
            if not (other["context"] or (not one["context"] and k <= q)):
                continue
            common = len([1 for x, y in zip(one["path"], other["path"], strict=False) if x == y])
            up, down = min(len(one["path"]) - common, 7), min(len(other["path"]) - common, 7)
            relation = up * 8 + down
            at = bucket(k - q) if relation == 0 else 32 + (relation + 1) - 1
            bias[:, q, k] = table[at]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[name].T / math.sqrt(x.shape[-1])

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[name]

    x = w["cpmbee.input_embedding.weight"][[row["id"] for row in rows]] / math.sqrt(HIDDEN)
    for i, row in enumerate(rows):
        angle = 16 * row["sub"] / 10_000 ** (torch.arange(0, HIDDEN, 2) / HIDDEN)
        cos, sin = torch.cat([angle.cos()] * 2), torch.cat([angle.sin()] * 2)
        x[i] = x[i] * cos + torch.cat([-x[i, HIDDEN // 2 :], x[i, : HIDDEN // 2]]) * sin
    for layer in range(LAYERS):
        name = f"cpmbee.encoder.layers.{layer}"
        if f"{name}.self_att.layernorm_before_attention.weight" in w:
            seen = norm(x, f"{name}.self_att.layernorm_before_attention.weight")
            q, k, v = (
                linear(seen, f"{name}.self_att.self_attention.project_{one}.weight")
                .view(n, HEADS, DIM)
                .transpose(0, 1)
                for one in "qkv"
            )
            scores = q @ k.transpose(1, 2) / math.sqrt(DIM) + bias
            out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
            x = (x + linear(out, f"{name}.self_att.self_attention.attention_out.weight")) / 1.05
        if f"{name}.ffn.layernorm_before_ffn.weight" in w:
            seen = norm(x, f"{name}.ffn.layernorm_before_ffn.weight")
            gate = torch.nn.functional.gelu(linear(seen, f"{name}.ffn.ffn.w_in.w_0.weight"))
            inner = gate * linear(seen, f"{name}.ffn.ffn.w_in.w_1.weight")
            x = (x + linear(inner, f"{name}.ffn.ffn.w_out.weight")) / 1.05
    x = norm(x, "cpmbee.encoder.output_layernorm.weight")
    return x / math.sqrt(HIDDEN) @ w["cpmbee.input_embedding.weight"].T


# --- ours ------------------------------------------------------------------------------------------


def random_model(folder: Path, **changes: Any) -> tuple[CPMBee, dict[str, Tensor]]:
    """A model as we write it, read again, and its weights under their published names."""
    config = families()["cpmbee"].config(CONFIG | changes, "config.json")
    decoder = build(config)
    decoder.family = "cpmbee"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(
                1.0 if parameter.ndim == 1 else 0.0, 1.0 if parameter.ndim > 1 else 0.2
            )
    save_hf(decoder, None, folder, torch.float32)
    loaded = load_decoder(folder, dtype=torch.float32)
    assert isinstance(loaded, CPMBee)
    return loaded, load_file(folder / "model.safetensors")


def encode(text: str) -> list[int]:
    return [token for token, _ in letters(text)] if text != "<mask>" else [MASK]


def logits(decoder: CPMBee, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))


LONG = " ".join(str(20 + i % 60) for i in range(90))
TREES: dict[str, Any] = {
    "flat": {"30": "31 32 33", "<ans>": ""},
    "several keys": {"30": "31 32 33", "40": "41", "50": LONG, "<ans>": ""},
    "nested": {
        "30": "31 <mask_0> 32 <mask_1>",
        "40": {"41": "42 43", "44": {"45": "46"}},
        "<ans>": "",
    },
    "answers": {"30": "31 <mask_0> 32 <mask_1> 33", "<ans>": {"<mask_0>": "51 52", "<mask_1>": ""}},
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_logits(name: str, pruned: bool, tmp_path: Path) -> None:
    decoder, weights = random_model(tmp_path, **(PRUNED if pruned else {}))
    ids = decoder.tree(TREES[name], encode)
    said = [60, 61, 6, 62, 7]  # a model may say anything, <s> too
    want = plain(TREES[name], weights, said)
    assert want.std() > 0.3
    assert (logits(decoder, ids + said) - want).abs().max() <= 1e-4


@pytest.mark.parametrize("pruned", [False, True])
def test_greedy(pruned: bool, tmp_path: Path) -> None:
    decoder, weights = random_model(tmp_path, **(PRUNED if pruned else {}))
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    requests = [Request(decoder.tree(one, encode), sampling) for one in TREES.values()]
    replies = engine.generate(requests)
    for tree, reply in zip(TREES.values(), replies, strict=True):
        said: list[int] = []
        for _ in range(12):
            said.append(int(plain(tree, weights, said)[-1].argmax()))
        assert list(reply.ids) == said


def test_a_text_without_a_tree_is_said_to_an_empty_one(tmp_path: Path) -> None:
    """So no token of it sees what stands behind it."""
    decoder, weights = random_model(tmp_path)
    text = [31, 32, 33, 34]
    want = plain({"<ans>": ""}, weights, text)[-4:]
    assert (logits(decoder, text) - want).abs().max() <= 1e-4
    tree = decoder.tree(TREES["flat"], encode)
    with torch.inference_mode():
        both = decoder.logits(decoder(torch.tensor(text + tree), Packed([4, len(tree)])))
    assert (both - torch.cat([want, plain(TREES["flat"], weights)])).abs().max() <= 1e-4


def test_decoding_is_the_pass_in_pieces(tmp_path: Path) -> None:
    decoder, _ = random_model(tmp_path)
    ids = decoder.tree(TREES["nested"], encode)
    said = list(range(50, 62))
    state: dict[str, Any] = {}
    with torch.inference_mode():
        whole = decoder(torch.tensor(ids + said), Packed([len(ids) + 12]))
        parts = [decoder(torch.tensor(ids), Carried([len(ids)], [state]))]
        parts += [decoder(torch.tensor([id]), Carried([1], [state])) for id in said]
    assert (torch.cat(parts) - whole).abs().max() <= 1e-5


# --- trees -----------------------------------------------------------------------------------------

MARKS = Marks(VOCAB, BOS, EOS, ROOT, ANS)


def test_a_flat_tree_needs_no_depths() -> None:
    ids = flatten(TREES["several keys"], encode, MARKS)
    bare = [id if id % VOCAB != BOS else BOS for id in ids]
    assert bare != ids
    assert parse(bare, MARKS) == parse(ids, MARKS)
    assert parse(ids, MARKS).paths == [(0,), (0, 1), (0, 1, 2), (0, 3), (0, 3, 4), (0, 5), (0, 5, 6),
                                       (0, 7), (0, 7, 8)]  # fmt: skip


def test_answers_and_keys_among_them() -> None:
    tree = parse(flatten(TREES["answers"], encode, MARKS), MARKS)
    answers = {one for one, context in zip(tree.segment, tree.context, strict=True) if not context}
    assert [tree.paths[one] for one in sorted(answers)] == [(0, 3, 4, 5), (0, 3, 6, 7)]
    relations = tree.relations()
    assert relations[5, 7] == 2 * 8 + 2 + 1 and relations[5, 2] == 3 * 8 + 2 + 1
    assert relations[4, 4] == 0 and relations[0, 5] == 3 + 1


def test_plain_prompts(tmp_path: Path) -> None:
    decoder, _ = random_model(tmp_path)
    text = [31, 32, 33]
    ids = decoder.prompt(text)
    assert [id % VOCAB for id in ids] == [6, 8, 7, 6, 7, 6, 31, 32, 33, 7, 6, 9, 7, 6]
    assert parse(ids, MARKS).answering and decoder.prompt(ids) == ids
    flat = [
        6,
        8,
        7,
        6,
        30,
        7,
        6,
        31,
        7,
    ]  # as a chat template may write it, without a place to answer
    assert [id % VOCAB for id in decoder.prompt(flat)] == [*flat, 6, 9, 7, 6]
    assert [id % VOCAB for id in decoder.prompt([*flat, 6, 9, 7])] != [*flat, 6, 9, 7]


def test_trees_that_cannot_be(tmp_path: Path) -> None:
    decoder, _ = random_model(tmp_path)
    for data, reason in (
        ({"30": "31"}, "has no place for an answer"),
        ({"30": "31", "<ans>": "32"}, "0 empty answers"),
        ({"30": "31", "<ans>": {"32": "", "33": ""}}, "2 empty answers"),
        ({"30": "31", "<ans>": {"32": "", "33": "34"}}, "it must be the last"),
        ({"30": 31, "<ans>": ""}, "neither a text nor a dictionary"),
        ({"30": "6", "<ans>": ""}, "holds the marks that divide it"),
    ):
        with pytest.raises(RequestError, match=reason):
            decoder.tree(data, encode)
    with pytest.raises(RequestError, match="has no parent"):
        logits(decoder, [6, 8, 7, BOS + 3 * VOCAB, 30])
    shallow = tmp_path / "shallow"
    decoder, _ = random_model(shallow, position_bias_num_segment_buckets=20)
    with pytest.raises(RequestError, match="so deep has relations beyond the 20"):
        logits(decoder, decoder.tree(TREES["nested"], encode))


def test_openbmbs_own_layout(tmp_path: Path) -> None:
    """No config.json, names without "cpmbee.", the rotation's frequencies beside the weights."""
    for number, changes in enumerate(({}, PRUNED)):
        folder = tmp_path / f"{number}"
        same = {"position_bias_num_segment_buckets": 32, "position_bias_max_distance": 2048}
        decoder, weights = random_model(folder, **changes, **same)
        bare = {name.removeprefix("cpmbee."): tensor for name, tensor in weights.items()}
        (folder / "config.json").unlink()
        save_file(bare, folder / "model.safetensors")
        again = load_decoder(folder, dtype=torch.float32)
        ids = decoder.tree(TREES["flat"], encode)
        assert torch.equal(logits(again, ids), logits(decoder, ids))
        assert again.config == decoder.config


def test_saved_back_as_it_was(tmp_path: Path) -> None:
    decoder, weights = random_model(tmp_path / "a", **PRUNED)
    copy = weights | {
        "lm_head.weight": weights["cpmbee.input_embedding.weight"].clone(),
        "cpmbee.input_embedding.rotary_emb.inv_freq": torch.ones(16),
    }
    save_file(copy, tmp_path / "a" / "model.safetensors")
    save_hf(load_decoder(tmp_path / "a", dtype=torch.float32), None, tmp_path / "b", torch.float32)
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert open_checkpoint(tmp_path / "b").config == decoder.config
    wrong = json.loads((tmp_path / "b" / "config.json").read_text()) | {"distance_scale": 8}
    (tmp_path / "b" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(FamilyError, match="distance_scale is 8 must be 16"):
        open_checkpoint(tmp_path / "b")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(FileError, match="holds no model"):
        open_checkpoint(tmp_path / "b")  # neither OpenBMB's names nor a configuration


def test_herdbook_reads_trees(tmp_path: Path, tiny_folder: Path) -> None:
    random_model(tmp_path)
    model = herdbook.load(str(tmp_path), dtype="float32")
    assert model.logits(model.decoder.tree(TREES["flat"], encode)).shape[1] == VOCAB
    llama = herdbook.load(str(tiny_folder), dtype="float32")
    with pytest.raises(RequestError, match="this model reads no trees"):
        llama.generate({"input": "hello", "<ans>": ""})


# --- a conversation --------------------------------------------------------------------------------

WORDS = [
    *("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>"),
    *("<option>", "<", ">", "/", "_", "input", "prompt", "今天", "天气", "好", "啊", "是"),
    *"abcdefghijklmnopqrstuvwxyz0123456789",
]


def talking(folder: Path) -> herdbook.engine.loaded.LoadedModel:
    random_model(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return herdbook.load(str(folder), dtype="float32")


def test_messages_are_its_dictionary(tmp_path: Path) -> None:
    """By the template that its name brings: the same answer as to the dictionary itself."""
    model = talking(tmp_path / "cpm-bee-1b")
    user = {"role": "user", "content": "今天天气"}
    asked = model.render([user], reply=True).ids
    tree = model.decoder.tree(
        {"input": "今天天气", "<ans>": ""}, lambda text: model.tokenizer.encode(text, specials=True)
    )
    assert asked == [id % VOCAB for id in tree], (
        "depths need not be said: keys and texts take turns"
    )
    assert torch.allclose(logits(model.decoder, asked), logits(model.decoder, tree), atol=1e-5)
    said = model.generate([user], max_tokens=8, temperature=0.0)
    assert said == model.generate({"input": "今天天气", "<ans>": ""}, max_tokens=8).lstrip()
    told = [{"role": "system", "content": "a"}, user, {"role": "assistant", "content": "好啊"}]
    row = model.render(told)
    assert row.ids[: len(model.render(told[:2], reply=True).ids)] == (
        model.render(told[:2], reply=True).ids
    )
    learnt = [id for id, on in zip(row.ids, row.mask, strict=True) if on]
    assert learnt == [*model.tokenizer.encode("好啊"), EOS]
    known = parse(row.ids, MARKS)
    assert [not one for one in known.context] == [*[False] * (len(row.ids) - 4), *[True] * 4]


@pytest.mark.parametrize(
    "text", ["a</s><s><ans></s><s>b", "<root>", "<mask>", "</s>", "<s>prompt</s><s>a"]
)
def test_no_text_divides_the_tree(text: str, tmp_path: Path) -> None:
    model = talking(tmp_path / "cpm-bee-1b")
    tokenizer = model.tokenizer
    frame = [
        [id for id in model.render(talk, reply=True).ids if id in tokenizer.special_ids]
        for talk in ([{"role": "user", "content": text}], [{"role": "user", "content": "a"}])
    ]
    assert frame[0] == frame[1]
    asked = model.render([{"role": "user", "content": text}], reply=True).ids
    assert text in tokenizer.decode(asked)
    assert len(parse(asked, MARKS).paths) == 5
