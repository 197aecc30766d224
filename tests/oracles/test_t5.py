"""T5 v1.0 and v1.1 and Switch Transformers against transformers, in float32: what the encoder makes of
a prompt, the logits of a reply, greedy replies, and the way back.

The bias tables are large, so that a wrong bucket shows; prompts reach beyond the last bucket.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FileError, RequestError
from herdbook.model.carried import Carried
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_hf
from herdbook.model.layout import Packed
from herdbook.model.t5 import T5
from tests.oracles.peers import differ, saved_bytes_agree

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "d_model": 48,
    "d_kv": 10,  # 4 heads of 10 are not d_model
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SWITCH = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2}
SWITCH |= {"num_sparse_decoder_layers": 2, "num_experts": 3}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1.0": ("T5", {}),
    "v1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "ul2": ("T5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "few-buckets": (
        "T5",
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    ),
    "switch": ("SwitchTransformers", SWITCH | {"expert_capacity": 64}),
    "switch-full": ("SwitchTransformers", SWITCH | {"expert_capacity": 12}),
    "switch-all": (
        "SwitchTransformers",
        SWITCH | {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}
        | {"dense_act_fn": "gelu_new", "router_bias": True},
    ),
}  # fmt: skip


def make(shape: str, folder: Path, **more: Any) -> Any:
    kind, changes = SHAPES[shape]
    config = getattr(transformers, kind + "Config")(**SIZES | changes | more)
    model = getattr(transformers, kind + "ForConditionalGeneration")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name or "router" in name:
                parameter.normal_(0, 1.0)
            elif parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0, 0.3 if "shared" in name else 0.15)
    model.save_pretrained(folder)
    return model


def some(n: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 120, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def compare(model: Any, decoder: Any, read: list[int], said: list[int]) -> None:
    """Both sides on one example: the encoder's last states, and the logits of the reply."""
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([[0, *said]]))
        row = [*read, 0, *said]
        hidden = decoder(torch.tensor(row), Packed([len(row)]))
        states = want.encoder_last_hidden_state[0]
        assert differ(hidden[: len(read)], states) <= 1e-4
        assert differ(decoder.logits(hidden[len(read) :]), want.logits[0]) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert isinstance(decoder, T5)
    for read, said in (
        (some(1), some(1)),
        (some(9), some(30)),
        (some(150), some(140, 2)),
    ):
        compare(model, decoder, [*read, 1], said)


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_back_and_loaded_by_transformers(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", dtype=torch.float32)
    save_hf(decoder, None, tmp_path / "ours", torch.float32)
    saved_bytes_agree(tmp_path / "theirs", tmp_path / "ours")
    decoder.source_config = {}  # as after tuning, or out of another format: the axes alone
    save_hf(decoder, None, tmp_path / "axes", torch.float32)
    for folder in ("ours", "axes"):
        again = type(model).from_pretrained(tmp_path / folder).eval()
        compare(again, decoder, [*some(9), 1], some(30))


@pytest.mark.parametrize("shape", ["v1.0", "v1.1", "switch"])
def test_greedy_equals_transformers(shape: str, tmp_path: Path) -> None:
    """Prompts of several lengths at once, one of them later than the others."""
    model = make(shape, tmp_path, num_layers=4, num_decoder_layers=4)  # its cache wants them equal
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    prompts = [some(n, seed) for seed, n in enumerate((1, 9, 40, 40, 3))]
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    for ids in prompts[:-1]:
        engine.submit(Request(ids, sampling))
    replies = {}
    for step in range(200):
        if step == 6:
            engine.submit(Request([*prompts[-1], 1, 0], sampling))  # its mark is there already
        for piece in engine.step():
            if piece.reply:
                replies[piece.request_id] = piece.reply
    assert not engine.busy and len(replies) == len(prompts)
    want = []
    for ids in prompts:
        found = model.generate(
            torch.tensor([[*ids, 1]]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        want.append(found[0, 1:].tolist())
    assert sorted(list(reply.ids) for reply in replies.values()) == sorted(want)
    assert len({id for ids in want for id in ids}) > 3
    assert {reply.prompt_tokens for reply in replies.values()} == {3, 11, 42, 5}


@pytest.mark.parametrize("shape", ["v1.0", "v1.1", "switch-full"])
def test_decoding_is_the_pass_in_pieces(shape: str, tmp_path: Path) -> None:
    """Two documents at once, any tokens: step by step as in one pass."""
    make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    rows = [[*some(n, n), 1, 0, *some(30, n + 1)] for n in (5, 40)]
    cuts = [[len(row) - 30, *range(len(row) - 29, len(row) - 9), len(row)] for row in rows]
    states: list[Any] = [{}, {}]
    pieces: list[list[torch.Tensor]] = [[], []]
    with torch.inference_mode():
        for start, end in pairwise([(0, 0), *zip(*cuts, strict=True)]):
            parts = [row[a:b] for row, a, b in zip(rows, start, end, strict=True)]
            lengths = [len(part) for part in parts]
            ids = torch.tensor([id for part in parts for id in part])
            found = decoder(ids, Carried(lengths, states)).split(lengths)
            for mine, piece in zip(pieces, found, strict=True):
                mine.append(piece)
        for row, mine in zip(rows, pieces, strict=True):
            whole = decoder(torch.tensor(row), Packed([len(row)]))
            assert differ(torch.cat(mine), whole) <= 1e-4


def test_an_expert_that_is_full_drops_the_same_tokens_in_decoding(tmp_path: Path) -> None:
    """transformers without a cache computes the reply anew for each token, as one pass."""
    model = make("switch-full", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    ids = some(30)
    (reply,) = Engine(decoder, None).generate(
        [Request(ids, Sampling(max_tokens=40, ignore_eos=True))]
    )
    want = model.generate(
        torch.tensor([[*ids, 1]]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        use_cache=False,
    )
    assert list(reply.ids) == want[0, 1:].tolist()
    roomy = model.generate(
        torch.tensor([[*ids, 1]]), max_new_tokens=40, do_sample=False, eos_token_id=None
    )
    assert list(reply.ids) != roomy[0, 1:].tolist()  # so that the test can tell


def test_a_preempted_sequence_begins_anew(tmp_path: Path) -> None:
    make("v1.1", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    requests = [Request(some(8, seed), sampling) for seed in range(4)]
    want = [
        reply.ids for reply in Engine(decoder, None, page_tokens=4, pages=64).generate(requests)
    ]
    tight = Engine(decoder, None, page_tokens=4, pages=12)
    assert [reply.ids for reply in tight.generate(requests)] == want
    assert tight.stats()["preemptions"] > 0


def test_a_pack_is_its_rows(tmp_path: Path) -> None:
    make("switch-full", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    rows = [[*some(n, n), 1, 0, *some(m, m)] for n, m in ((5, 9), (17, 1), (30, 25), (5, 9))]
    with torch.inference_mode():
        together = decoder(
            torch.tensor([id for row in rows for id in row]), Packed(list(map(len, rows)))
        )
        apart = torch.cat([decoder(torch.tensor(row), Packed([len(row)])) for row in rows])
    assert differ(together, apart) <= 1e-4


def test_a_row_without_a_mark_is_said_to_an_empty_some(tmp_path: Path) -> None:
    make("v1.0", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    ids = some(12)
    with torch.inference_mode():
        bare = decoder(torch.tensor(ids), Packed([12]))
        full = decoder(torch.tensor([1, 0, *ids]), Packed([14]))
        both = decoder(torch.tensor([*ids, 5, 0, 7]), Packed([12, 3]))
    assert torch.equal(bare, full[2:])
    assert torch.allclose(both[:12], bare, atol=1e-5) and len(both) == 15
    with pytest.raises(RequestError, match="leaves the encoder nothing to read"):
        Engine(decoder, None).submit(Request([0, 5, 6]))


def test_examples_of_a_conversation(tmp_path: Path) -> None:
    """Each answer is said to all that came before it."""
    make("v1.0", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    ids = [5, 6, 7, 8, 1, 9, 10, 11, 1]
    mask = [False, False, True, True, True, False, False, True, True]
    assert decoder.examples(ids, mask) == [
        ([5, 6, 1, 0, 7, 8, 1], [False] * 4 + [True] * 3),
        ([5, 6, 7, 8, 1, 9, 10, 1, 0, 11, 1], [False] * 9 + [True] * 2),
    ]
    assert decoder.examples([5, 6], [False, False]) == []


def published(folder: Path, target: Path, **tensors: torch.Tensor) -> None:
    """As checkpoints of 2022 are: copies of the embedding, no keys of transformers 5."""
    weights = load_file(folder / "model.safetensors") | tensors
    for stack in ("encoder", "decoder"):
        weights.setdefault(f"{stack}.embed_tokens.weight", weights["shared.weight"].clone())
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    weights[unused] = torch.randn(32, 4)
    target.mkdir()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act", "is_decoder"):
        del config[key]
    config |= {"n_positions": 512, "output_past": True, "tokenizer_class": "T5Tokenizer"}
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    (target / "config.json").write_text(json.dumps(config))


def test_checkpoints_as_they_were_published(tmp_path: Path) -> None:
    make("v1.1", tmp_path / "new")
    head = torch.randn(120, 48)
    published(tmp_path / "new", tmp_path / "old", **{"lm_head.weight": head})
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "old").eval()
    assert torch.equal(model.lm_head.weight, head)
    decoder = load_decoder(tmp_path / "old", dtype=torch.float32)
    compare(model, decoder, [*some(9), 1], some(30))
    # saved by transformers 5, which says that the two are tied
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"]
    assert not open_checkpoint(tmp_path / "again").config.tied
    compare(model, load_decoder(tmp_path / "again", dtype=torch.float32), [*some(9), 1], some(30))

    model = make("v1.0", tmp_path / "tied")
    published(tmp_path / "tied", tmp_path / "tied-old")
    decoder = load_decoder(tmp_path / "tied-old", dtype=torch.float32)
    compare(model, decoder, [*some(9), 1], some(30))


def test_a_copy_that_differs_is_refused(tmp_path: Path) -> None:
    make("v1.0", tmp_path / "new")
    other = {"encoder.embed_tokens.weight": torch.randn(120, 48)}
    published(tmp_path / "new", tmp_path / "old", **other)
    with pytest.raises(FileError, match=r"'encoder\.embed_tokens\.weight' differs from 'shared"):
        open_checkpoint(tmp_path / "old")
    shutil.copytree(tmp_path / "new", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(FileError, match="is_decoder is true"):
        open_checkpoint(tmp_path / "odd")
