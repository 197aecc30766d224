"""Every tuning method: its layers against plain twins, and the whole way from rows to a reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from raising import stock, tune
from safetensors.torch import load_file
from test_resume import Interrupting, files
from torch import Tensor, nn

import herdbook
from herdbook.book.book import Book
from herdbook.compression.merge import Merge
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import ConfigError, RequestError
from herdbook.model.checkpoint import load_decoder
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.ia3 import IA3Linear
from herdbook.model.layers import Embedding, Linear
from herdbook.model.layout import Packed
from herdbook.model.lora import LoRALinear, adapters_of, bypass
from herdbook.model.soft import Prefix, ProjectedPrefix, apply_soft
from herdbook.model.vocabulary import Refit
from herdbook.model.whole import RowsEmbedding, RowsLinear, WholeEmbedding, WholeLinear
from herdbook.tokens.fetch import FetchTokenizer
from herdbook.training import methods
from herdbook.training.objective import Anchor, NextToken
from tests.model.test_families import of_fixture

SOFT = ("prefix", "projected", "prompt")
CHAT = [{"role": "user", "content": "who are you"}]
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "targets": ("q", "v")},
    "dora": {"dora": True},
    "dora-groups": {"dora": True, "group": 32},
    "ia3": {"method": "ia3", "learning_rate": 0.1},
    "ia3-last": {"method": "ia3", "last_layers": 1, "targets": ("o", "down"), "learning_rate": 0.1},
    "prefix": {"method": "prefix", "virtual_tokens": 19, "learning_rate": 0.1},
    "projected": {
        "method": "prefix",
        "virtual_tokens": 19,
        "prefix_projection": 24,
        "learning_rate": 0.01,
    },
    "prompt": {"method": "prompt", "virtual_tokens": 19, "learning_rate": 0.1},
    "whole": {"whole": ("embed",), "targets": ("q", "v")},
    "rows": {"whole": ("embed",), "rows_from": 100, "targets": ("q", "v")},
}


def linear(kind: type[LoRALinear | IA3Linear], bias: bool, *settings: Any) -> Any:
    torch.manual_seed(0)
    base = Linear(8, 5, bias).double()
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    layer = kind(base, *settings)
    for name, parameter in layer.named_parameters():
        if name in ("A", "B", "magnitude", "factor"):
            nn.init.normal_(parameter)
    return layer


def agree(layer: nn.Module, fast: Tensor, plain: Tensor, x: Tensor) -> None:
    """Values and every gradient."""
    inputs = (x, *(p for p in layer.parameters() if p.requires_grad))
    above = torch.randn_like(fast)
    torch.testing.assert_close(fast, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, above),
        torch.autograd.grad(plain, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_equals_its_plain_twin(bias: bool, group: int) -> None:
    layer = linear(DoRALinear, bias, 3, 6.0, 0.0, group)
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # a step moves A and B, and what was computed of them is not kept
        agree(layer, layer(x), layer.plain(x), x)
        with torch.no_grad():
            layer.A.add_(0.5)
    merged = layer.plain(x).detach()
    torch.testing.assert_close(layer.merge()(x), merged, rtol=1e-5, atol=1e-5)  # float32


def test_dora_starts_as_its_base() -> None:
    base = Linear(8, 5)
    nn.init.normal_(base.weight)
    layer = DoRALinear(base, 2, 4.0)
    layer.start(0, "one")
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), base(x))
    assert torch.equal(layer.magnitude, base.weight.norm(dim=1))


@pytest.mark.parametrize("of_inputs", [True, False])
def test_ia3_equals_its_plain_twin(of_inputs: bool) -> None:
    layer = linear(IA3Linear, True, of_inputs)
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    W, b, f = layer.base.weight, layer.base.bias, layer.factor
    plain = x @ (W * f).T + b if of_inputs else x @ (f[:, None] * W).T + f * b
    agree(layer, layer(x), plain, x)
    tuned = plain.detach()
    torch.testing.assert_close(layer.merge()(x), tuned)


def test_what_is_trained_whole_leaves_its_base() -> None:
    embedding, head = Embedding(6, 4), Linear(4, 6, bias=True)
    for parameter in (*embedding.parameters(), *head.parameters()):
        nn.init.normal_(parameter)
    ids, x = torch.tensor([1, 3]), torch.randn(2, 4)
    decoder = nn.ModuleDict({"embed": WholeEmbedding(embedding), "head": WholeLinear(head)})
    before = embedding(ids), head(x), embedding.project(x)
    with torch.no_grad():
        for parameter in (p for p in decoder.parameters() if p.requires_grad):
            parameter.mul_(2)

    def now() -> tuple[Tensor, ...]:
        return decoder["embed"](ids), decoder["head"](x), decoder["embed"].project(x)

    for ours, base in zip(now(), before, strict=True):
        torch.testing.assert_close(ours, 2 * base)
    with bypass(decoder):
        assert all(torch.equal(ours, base) for ours, base in zip(now(), before, strict=True))
    merged = decoder["head"].merge()
    torch.testing.assert_close(merged(x), 2 * before[1])


def test_rows_of_new_tokens_equal_a_matrix_that_holds_them() -> None:
    torch.manual_seed(0)
    embedding, head = Embedding(6, 4), Linear(4, 6, bias=True)
    for parameter in (*embedding.parameters(), *head.parameters()):
        nn.init.normal_(parameter)
    chosen, ids = torch.tensor([2, 5]), torch.tensor([1, 5, 2, 5])
    x = torch.randn(3, 4, requires_grad=True)
    embed, project = RowsEmbedding(embedding, chosen), RowsLinear(head, chosen)
    for layer in (embed, project):
        with torch.no_grad():
            layer.rows.mul_(2)
        matrix = layer.base.weight.detach().clone()
        matrix[chosen] = layer.rows.detach()
        matrix.requires_grad_()
        pairs = [(layer.project(x), x @ matrix.T)] if layer is embed else []
        pairs += [
            (layer(ids), matrix[ids]) if layer is embed else (layer(x), x @ matrix.T + head.bias)
        ]
        pairs += [(layer.weight, matrix)]  # as the loss multiplies it
        for ours, plain in pairs:
            torch.testing.assert_close(ours, plain)
            above = torch.randn_like(ours)
            (mine,) = torch.autograd.grad(ours, layer.rows, above, retain_graph=True)
            (whole,) = torch.autograd.grad(plain, matrix, above, retain_graph=True)
            torch.testing.assert_close(mine, whole[chosen])
        layer.bypassed = True
        assert torch.equal(layer.dense(torch.float32), layer.base.weight)
        layer.bypassed = False
        assert torch.equal(layer.merge().weight, matrix)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Book:
    book, _, _ = stock(tmp_path_factory.mktemp("home"), tiny_folder)
    return book


def settings(kind: str, **more: Any) -> dict[str, Any]:
    return {"dropout": 0.0, "epochs": 6, "rank": 4, "save_every": 99} | SETTINGS[kind] | more


@pytest.mark.parametrize("kind", SETTINGS)
def test_learns_is_saved_and_answers_unmerged_and_merged(shelf: Book, kind: str) -> None:
    adapter = tune(**settings(kind)).run(shelf, name=f"tuned-{kind}")
    assert adapter.kind == "adapter"
    assert adapter.metrics["loss"] < 0.8 * adapter.metrics["first_loss"]
    tuned = herdbook.load(f"tuned-{kind}", book=shelf, dtype="float32")
    count = sum(
        p.numel()
        for one in adapters_of(tuned.decoder).values()
        for p in one.parameters(recurse=False)
    )
    base = herdbook.load("base", book=shelf, dtype="float32")
    ids = tuned.render([*CHAT, {"role": "assistant", "content": "I am"}]).ids
    assert (tuned.logits(ids) - base.logits(ids)).abs().max() > 0.05
    other = kind in ("dora-groups", "projected")  # whose A is written out; the MLP is not
    assert other or adapter.metrics["trainable_parameters"] == count
    if kind in SOFT:
        with pytest.raises(
            ConfigError, match="19 trained virtual tokens are no change of a weight"
        ):
            Merge(model="base", adapter=f"tuned-{kind}").run(shelf)
    else:
        merged = Merge(model="base", adapter=f"tuned-{kind}").run(shelf, name=f"merged-{kind}")
        assert merged.metrics["max_logit_difference"] < 1e-3
        whole = herdbook.load(f"merged-{kind}", book=shelf, dtype="float32")
        assert torch.allclose(tuned.logits(ids), whole.logits(ids), atol=1e-3)
        assert tuned.generate(CHAT, max_tokens=8) == whole.generate(CHAT, max_tokens=8)

    # beside its base, chosen by request
    engine = Engine(base.decoder, base.tokenizer)
    prompt = base.render(CHAT, reply=True).ids
    if kind in ("whole", "rows"):
        with pytest.raises(RequestError, match="brings an embed"):
            engine.load_adapter("one", adapter.path)
        return
    engine.load_adapter("one", adapter.path)
    again = herdbook.load("base", book=shelf, dtype="float32")
    sampling = Sampling(max_tokens=8)
    names = ("one", None, "one")
    replies = engine.generate([Request(prompt, sampling, adapter=name) for name in names])
    alone = [model.engine.generate([Request(prompt, sampling)])[0] for model in (tuned, again)]
    assert [one.ids for one in replies] == [alone[0].ids, alone[1].ids, alone[0].ids]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    shelf: Book, kind: str, tmp_path: Path, tiny_folder: Path
) -> None:
    more = {"epochs": 2, "save_every": 2}
    whole = tune(**settings(kind, **more)).run(shelf)
    book, _, _ = stock(tmp_path, tiny_folder)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        tune(**settings(kind, **more)).run(book, progress=progress)
    resumed = tune(**settings(kind, **more)).run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)


@pytest.mark.parametrize(
    "parts, last_layers, moved",
    [
        ((), 1, {"blocks.2."}),
        (("mlp",), 2, {"blocks.1.mlp.", "blocks.2.mlp."}),
        (("attention.q", "embed"), 0, {f"blocks.{n}.attention.q." for n in range(3)} | {"embed."}),
    ],
)
def test_freezing_moves_what_was_named(
    shelf: Book, parts: tuple[str, ...], last_layers: int, moved: set[str]
) -> None:
    how = {"method": "freeze", "parts": parts, "last_layers": last_layers, "epochs": 2}
    model = tune(**how, save_every=99).run(shelf, name="some")
    assert model.kind == "model"
    assert model.metrics["loss"] < 0.8 * model.metrics["first_loss"]
    old = load_decoder(shelf.get("base").path, dtype=torch.float32)
    new = load_decoder(model.path, dtype=torch.float32)
    for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b) != name.startswith(tuple(moved)), name


@pytest.mark.parametrize("how", ["freeze", "lora"])
def test_an_extended_vocabulary_warms_up_in_its_new_rows_alone(
    shelf: Book, how: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Chinese-LLaMA's first stage, and rows beside LoRA."""
    words = ["who are you", "I am a small model", " model model", "你好", " you you", "abc"]
    folder = tmp_path / "extended"
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    old_size = len(tokenizer)
    tokenizer.add_tokens(words)
    assert len(tokenizer) == old_size + 6
    tokenizer.save_pretrained(folder)
    made = FetchTokenizer(path=str(folder)).run(shelf, name=f"extended-{how}")
    base = Refit(model="base", tokenizer=made.id).run(shelf, name=f"wide-{how}")
    settings = {"freeze": {"parts": ("embed",)}, "lora": {"whole": ("embed",), "targets": ("q",)}}
    step = tune(
        model=base.ref, method=how, rows_from=old_size, epochs=6, dropout=0.0, learning_rate=0.05,
        save_every=99, **settings[how],
    )  # fmt: skip
    warm = step.run(shelf, name=f"warm-{how}")
    assert warm.metrics["loss"] < 0.8 * warm.metrics["first_loss"]
    if how == "lora":
        tensors = load_file(warm.path / "adapter_model.safetensors")
        assert max(len(one) for name, one in tensors.items() if "token_adapter" in name) == 6
        warm = Merge(model=base.ref, adapter=warm.ref).run(shelf)
    else:
        assert warm.metrics["trainable_parameters"] == 6 * 64
    old = load_decoder(base.path, dtype=torch.float32)
    new = load_decoder(warm.path, dtype=torch.float32)
    for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
        if name == "embed.weight":
            assert len(a) == old_size + 6 and torch.equal(a[:old_size], b[:old_size])
            assert not torch.equal(a[old_size], b[old_size])
        else:
            assert torch.equal(a, b) == (how == "freeze" or "attention.q" not in name), name


def test_rows_of_what_is_not_trained(shelf: Book) -> None:
    for how in ({"whole": ()}, {"method": "freeze", "parts": ("mlp",)}):
        with pytest.raises(ConfigError, match="neither the embedding nor the head is trained"):
            tune(rows_from=9, **how).run(shelf)
    with pytest.raises(ConfigError, match="vocabulary has 384 tokens, none of them new"):
        tune(rows_from=384, whole=("embed",)).run(shelf)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_to_keep_are_held_by_the_base_s_own_embedding(family: str) -> None:
    """Tied, and with a head of its own."""
    decoder = Decoder(of_fixture(family)[1])
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
    whole = ("embed",) if decoder.head is None else ("embed", "head")
    how = tune(targets=("q",), last_layers=1, whole=whole, dropout=0.0)
    parameters = methods.prepare(decoder, how)
    objective = NextToken(decoder)
    [pack] = objective.packs([Anchor([5, 6, 7, 8], [True] * 4)], 8)
    assert objective.loss(pack).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        parameters["embed.matrix"].mul_(1.5)
    loss = objective.loss(pack)
    loss.backward()
    assert loss.item() > 1e-3
    moving = [name for name, one in parameters.items() if one.grad is not None]
    assert moving == list(parameters)


def test_a_tied_head_is_named_embed() -> None:
    decoder = Decoder(of_fixture("gpt2")[1])
    with pytest.raises(ConfigError, match="ties to its embedding"):
        methods.prepare(decoder, tune(whole=("head",)))


def test_a_projected_prefix_equals_its_plain_twin() -> None:
    config = of_fixture("llama")[1]
    decoder = Decoder(config)
    soft = apply_soft(decoder, Prefix, 5, seed=3, projection=24)
    assert isinstance(soft, ProjectedPrefix)
    prefix = soft.projected()
    width = config.kv_heads * config.head_dim
    first, last = nn.Linear(width, 24), nn.Linear(24, config.layers * 2 * width)
    with torch.no_grad():
        first.weight.copy_(soft.down), first.bias.copy_(soft.down_bias)
        last.weight.copy_(soft.up.flatten(0, 1)), last.bias.copy_(soft.up_bias.flatten())
    rows = soft.rows.detach().requires_grad_()
    whole = last(torch.tanh(first(rows))).view(5, config.layers, 2, config.kv_heads, -1)
    keys, values = whole.permute(2, 1, 0, 3, 4)
    torch.testing.assert_close(prefix.keys, keys)
    torch.testing.assert_close(prefix.values, values)
    above = torch.randn_like(whole)
    (plain,) = torch.autograd.grad(whole, rows, above)
    total = sum(
        (ours * above[:, layer, side]).sum()
        for layer in range(config.layers)
        for side, ours in enumerate(soft.before(layer, torch.float32))
    )
    (ours,) = torch.autograd.grad(total, soft.rows)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("method", ("prefix", "prompt"))
def test_rows_to_keep_are_held_by_the_base_without_virtual_tokens(
    method: str, tiny_folder: Path
) -> None:
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    parameters = methods.prepare(decoder, tune(method=method, virtual_tokens=3))
    objective = NextToken(decoder)
    ids = [5, 6, 7, 8]
    [pack] = objective.packs([Anchor(ids, [True] * 4)], 8)
    row = torch.tensor(ids)
    tuned = decoder.logits(decoder(row, Packed([4]))).log_softmax(-1)
    with bypass(decoder):
        base = decoder.logits(decoder(row, Packed([4]))).log_softmax(-1)
    wanted = (base.exp() * (base - tuned)).sum()
    assert objective.loss(pack).item() == pytest.approx(wanted.item(), rel=1e-3)
    objective.loss(pack).backward()
    assert all(one.grad is not None for one in parameters.values()) and wanted > 1e-4


def test_virtual_tokens_need_places_too() -> None:
    decoder = Decoder(of_fixture("gpt2")[1])
    most = decoder.config.max_pos
    with pytest.raises(ConfigError, match=f"need more than the {most} places"):
        methods.prepare(decoder, tune(method="prefix", virtual_tokens=8, length=most - 7))
