"""RWKV-4 against transformers' `rwkv` (float32, rescale_every=0), and against its own recurrence.

The weights are large and the decays span slow and fast, so that a wrong sign, shift or state shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FileError
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_hf
from herdbook.model.layout import Packed
from herdbook.model.rwkv import RWKV, wkv
from tests.oracles.peers import differ, ours, prompt, saved_bytes_agree, theirs

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "context_length": 256,
    "rescale_every": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "time_mix" in name:
                parameter.uniform_(0, 1)
            elif "time_decay" in name:
                parameter.uniform_(-4, 2)
            elif "time_first" in name:
                parameter.normal_(0, 1)
            elif parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0, 0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**SIZES)).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rwkv")
    model.save_pretrained(folder)
    return folder


def test_logits(model: Any, folder: Path) -> None:
    decoder = load_decoder(folder, dtype=torch.float32)
    assert isinstance(decoder, RWKV)
    for n in (1, 8, 77):
        assert differ(ours(decoder, prompt(n)), theirs(model, prompt(n))) <= 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_hidden_size": 48, "intermediate_size": 100, "layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": True},
    ],
)
def test_other_shapes(changes: dict[str, Any], tmp_path: Path) -> None:
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**SIZES | changes)).eval()
    randomise(model, 3)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(30)), theirs(model, prompt(30))) <= 1e-4


def test_rescaling_changes_nothing(model: Any, folder: Path, tmp_path: Path) -> None:
    """transformers' own inference halves hidden states every two layers; ours need not."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rescale_every": 2}))
    save_file(
        load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"}
    )
    rescaled = transformers.RwkvForCausalLM.from_pretrained(tmp_path).eval()
    got = ours(load_decoder(tmp_path, dtype=torch.float32), prompt(30))
    assert differ(got, theirs(rescaled, prompt(30))) <= 1e-3  # the norm's eps counts a little


def test_documents_of_a_pack_do_not_see_each_other(folder: Path) -> None:
    decoder = load_decoder(folder, dtype=torch.float32)
    rows = [prompt(n, seed) for seed, n in enumerate((5, 17, 5, 1))]
    with torch.inference_mode():
        together = decoder(
            torch.tensor([id for row in rows for id in row]), Packed([len(row) for row in rows])
        )
        apart = torch.cat([decoder(torch.tensor(row), Packed([len(row)])) for row in rows])
    assert differ(together, apart) <= 1e-5


def test_greedy_equals_transformers(model: Any, folder: Path) -> None:
    """Several prompts at once, in chunks, joining and leaving the batch; and one begun in between."""
    decoder = load_decoder(folder, dtype=torch.float32)
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    prompts = [prompt(n, seed) for seed, n in enumerate((1, 9, 40, 40, 3))]
    prompts.append(prompts[2])
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    late = Request(prompt(1, 99), sampling)
    for ids in prompts:
        engine.submit(Request(ids, sampling))
    replies = {}
    for step in range(200):
        if step == 6:
            engine.submit(late)
        for piece in engine.step():
            if piece.reply:
                replies[piece.request_id] = piece.reply
    assert not engine.busy and len(replies) == 7
    want = [
        model.generate(
            torch.tensor([ids]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        for ids in [*prompts, late.ids]
    ]
    assert sorted(list(r.ids) for r in replies.values()) == sorted(want)
    assert all(reply.cached_tokens == 0 for reply in replies.values())


def test_a_preempted_sequence_begins_anew(folder: Path) -> None:
    decoder = load_decoder(folder, dtype=torch.float32)
    sampling = Sampling(max_tokens=24, ignore_eos=True)
    requests = [Request(prompt(8, seed), sampling) for seed in range(4)]
    roomy = Engine(decoder, None, page_tokens=4, pages=64)
    tight = Engine(decoder, None, page_tokens=4, pages=12)
    want = [reply.ids for reply in roomy.generate(requests)]
    assert [reply.ids for reply in tight.generate(requests)] == want
    assert tight.stats()["preemptions"] > 0 and roomy.stats()["preemptions"] == 0


def test_saved_back_and_loaded_by_transformers(model: Any, folder: Path, tmp_path: Path) -> None:
    save_hf(load_decoder(folder, dtype=torch.float32), None, tmp_path, torch.float32)
    saved_bytes_agree(folder, tmp_path)
    again = transformers.RwkvForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(theirs(again, prompt(20)), theirs(model, prompt(20)))


HIS = {
    "rwkv.embeddings.weight": "emb.weight",
    "rwkv.blocks.0.pre_ln.weight": "blocks.0.ln0.weight",
    "rwkv.blocks.0.pre_ln.bias": "blocks.0.ln0.bias",
    "rwkv.ln_out.weight": "ln_out.weight",
    "rwkv.ln_out.bias": "ln_out.bias",
    "head.weight": "head.weight",
} | {
    f"rwkv.blocks.{n}.{theirs}": f"blocks.{n}.{his}"
    for n in range(3)
    for theirs, his in {
        "ln1.weight": "ln1.weight",
        "ln1.bias": "ln1.bias",
        "ln2.weight": "ln2.weight",
        "ln2.bias": "ln2.bias",
        "attention.time_decay": "att.time_decay",
        "attention.time_first": "att.time_first",
        "attention.time_mix_key": "att.time_mix_k",
        "attention.time_mix_value": "att.time_mix_v",
        "attention.time_mix_receptance": "att.time_mix_r",
        "attention.key.weight": "att.key.weight",
        "attention.value.weight": "att.value.weight",
        "attention.receptance.weight": "att.receptance.weight",
        "attention.output.weight": "att.output.weight",
        "feed_forward.time_mix_key": "ffn.time_mix_k",
        "feed_forward.time_mix_receptance": "ffn.time_mix_r",
        "feed_forward.key.weight": "ffn.key.weight",
        "feed_forward.receptance.weight": "ffn.receptance.weight",
        "feed_forward.value.weight": "ffn.value.weight",
    }.items()
}


def test_blinkdls_layout_without_a_config(folder: Path, model: Any, tmp_path: Path) -> None:
    """The names in which RWKV-4 was published, written out one by one."""
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == HIS.keys()
    his = {HIS[name]: tensor for name, tensor in weights.items()}
    save_file(his, tmp_path / "RWKV-4-World-tiny-ctx4096.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.max_pos == 4096 and checkpoint.config.layers == 3
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(30)), theirs(model, prompt(30))) <= 1e-4
    save_hf(decoder, None, tmp_path / "back", torch.float32)
    again = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.allclose(theirs(again, prompt(20)), theirs(model, prompt(20)), atol=1e-5)


def test_what_is_no_rwkv_4_is_refused(folder: Path, tmp_path: Path) -> None:
    his = {HIS[n]: t for n, t in load_file(folder / "model.safetensors").items()}
    newer = his | {"blocks.0.att.gate.weight": torch.zeros(48, 48)}
    save_file(newer, tmp_path / "RWKV-5-World.safetensors")
    with pytest.raises(FileError, match=r"holds no model: no config\.json"):
        open_checkpoint(tmp_path)
    missing = {name: tensor for name, tensor in his.items() if name != "blocks.2.att.key.weight"}
    save_file(missing, tmp_path / "RWKV-5-World.safetensors")
    with pytest.raises(FileError, match=r"tensor 'blocks\.2\.att\.key\.weight' is missing"):
        open_checkpoint(tmp_path)


def recurrence(w: Any, u: Any, k: Any, v: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The twin: token after token, as the paper's appendix writes it. k, v [L, A]."""
    a, b, p = torch.zeros_like(w), torch.zeros_like(w), torch.full_like(w, -1e30)
    out = []
    for kt, vt in zip(k, v, strict=True):
        q = torch.maximum(p, u + kt)
        e, f = torch.exp(p - q), torch.exp(u + kt - q)
        out.append((e * a + f * vt) / (e * b + f))
        q = torch.maximum(p + w, kt)
        e, f = torch.exp(p + w - q), torch.exp(kt - q)
        a, b, p = e * a + f * vt, e * b + f, q
    return torch.stack(out), (a, b, p)


def test_the_parallel_form_is_the_recurrence_with_its_gradient() -> None:
    torch.manual_seed(0)
    w = -torch.exp(torch.empty(6).uniform_(-4, 2)).double()
    u = torch.randn(6).double()
    k, v = 20 * torch.randn(2, 21, 6).double(), torch.randn(2, 21, 6).double()
    leaves = [one.requires_grad_() for one in (w, u, k, v)]
    start = torch.zeros(2, 6).double()
    got, memory = wkv(w, u, k, v, (start, start, start - 1e30))
    pairs = [recurrence(w, u, k[i], v[i]) for i in range(2)]
    want = torch.stack([one for one, _ in pairs])
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    true = [
        torch.stack([state[0] * state[2].exp() for _, state in pairs]),
        memory[0] * memory[2].exp(),
    ]
    assert torch.allclose(true[0], true[1], rtol=1e-9)
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
