"""What is kept on disk while a model trains: the same bytes come out, and the memory is free."""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raising import Rows, classify, stock, tune
from test_resume import Interrupting, files

from herdbook.errors import CapacityError, ConfigError, FamilyError
from herdbook.files import safetensors
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_gguf, save_hf
from herdbook.model.checkpoint.weights import as_bytes
from herdbook.model.families import by_source
from herdbook.model.layout import Packed
from herdbook.model.modules import build
from herdbook.model.streamed import held_bytes
from herdbook.training import fitting, methods, offload, parallel, planning, state
from herdbook.training.activations import Load
from herdbook.training.offload import Offload

FIXTURES = Path(__file__).parents[1] / "model" / "families"

WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"method": "full"},
    "adamw8": {"method": "full", "optimiser": "adamw8", "precision": "bfloat16", "average": 0.9},
    "lion": {"method": "full", "optimiser": "lion", "precision": "mixed"},
    "adafactor": {"method": "full", "optimiser": "adafactor", "average": 0.5},
    "lora": {"dropout": 0.1},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_optimiser_s_state_on_disk_makes_the_same_bytes(
    way: str, tmp_path: Path, tiny_folder: Path
):
    settings: dict[str, Any] = {"learning_rate": 1e-3, **WAYS[way]}
    book, _, _ = stock(tmp_path / "memory", tiny_folder)
    whole = tune(**settings).run(book)
    book, _, _ = stock(tmp_path / "disk", tiny_folder)
    progress = Interrupting()
    step = tune(**settings, offload=("optimiser",))
    with pytest.raises(KeyboardInterrupt):
        step.run(book, progress=progress)
    (saved,) = book.home.rglob(state.NAME)  # and nothing else that a run could go on from
    assert {one.name for one in saved.parent.iterdir()} <= {"out", "lock", state.NAME}
    resumed = step.run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)
    assert resumed.id == whole.id


def test_a_run_that_was_begun_in_memory_goes_on_on_disk(tmp_path: Path, tiny_folder: Path):
    """How it is computed is no part of what is made: neither of the step's key nor of the state's."""
    book, _, _ = stock(tmp_path, tiny_folder)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        tune(method="full").run(book, progress=progress)
    made = tune(method="full", offload=("optimiser",)).run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert tune(method="full").run(book).id == made.id


def test_what_was_kept_is_in_the_file_alone(tmp_path: Path):
    weight = torch.nn.Parameter(torch.zeros(1000, 300))
    shelf = Offload(tmp_path, [weight])
    kept = {"step": torch.tensor(3.0), "first": torch.randn(1000, 300), "codes": torch.arange(9)}
    before = {key: value.clone() for key, value in kept.items()}
    shelf.keep(kept)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    for key, value in kept.items():
        assert torch.equal(value, before[key])
    places = {key: value.data_ptr() for key, value in kept.items()}
    kept["first"].mul_(2)
    shelf.keep(kept)
    assert {key: value.data_ptr() for key, value in kept.items()} == places
    assert torch.equal(kept["first"], 2 * before["first"])
    assert places["first"] % mmap.ALLOCATIONGRANULARITY == 0


#: trains 38 MB of weights with AdamW, and prints the anonymous memory that the third step begins with; a
#: matrix so large that glibc gives it back at once
SHAPE = """
import sys, tempfile
from pathlib import Path
import torch
from herdbook.tokens.chat import Rendering
from herdbook.training import loop
from test_loop import PLAN

class Squares:
    seen = 0
    def packs(self, rows, capacity): return list(rows)
    def weight(self, pack): return 1
    def loss(self, pack):
        self.seen += 1
        if self.seen == 3:
            lines = Path("/proc/self/status").read_text().splitlines()
            print(next(int(one.split()[1]) * 1024 for one in lines if one.startswith("RssAnon")))
            raise KeyboardInterrupt
        return (weight * weight).sum()

weight = torch.nn.Parameter(torch.ones(3072, 3072))
plan = PLAN.__class__(**(vars(PLAN) | {"batch": 1}))
with tempfile.TemporaryDirectory() as folder:
    try:
        rows = [Rendering([1], [True])] * 9
        loop.train(Squares(), {"w": weight}, rows, plan, Path(folder), offload=sys.argv[1] == "disk")
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="counts memory as Linux tells it"
)
def test_the_state_takes_no_memory_of_its_own():
    memory, disk = (int(program(SHAPE, where)) for where in ("memory", "disk"))
    state_bytes = 3072 * 3072 * 8
    assert memory - disk > 0.9 * state_bytes


def program(text: str, *arguments: str) -> str:
    """What it prints, in a process of its own."""
    places = Path(offload.__file__).parents[2], Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(map(str, places)), "OMP_NUM_THREADS": "1"},
    )
    return ran.stdout


def test_the_plan_counts_it(tiny_folder: Path):
    checkpoint = open_checkpoint(tiny_folder)
    load, how = Load((64,) * 200, 6000, several=True), tune(method="full", pack=12_800)
    off = tune(method="full", pack=12_800, offload=("optimiser",))
    here, there = (planning.memory_of(checkpoint, one, load, 0) for one in (how, off))
    assert 0 < there.optimiser < here.optimiser / 3 and there.weights == here.weights
    disk = planning.disk_of(checkpoint, off)
    assert disk.offloaded == here.optimiser
    assert disk.total == planning.disk_of(checkpoint, how).total + here.optimiser
    changes = list(fitting.milder(how, 64))
    assert {"offload": ("optimiser",)} in changes
    with pytest.raises(CapacityError, match="offloaded") as caught:
        fitting.need_disk(planning.Disk(10**18, 1, 5 * 10**9), tiny_folder)
    assert "5.0 GB" in str(caught.value)
    with pytest.raises(CapacityError) as caught:
        fitting.refuse(checkpoint, how, Load((64,), 6, False), here, room=there.peak)
    assert "--tune." in caught.value.next


def test_several_processes_are_refused(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    book, _, _ = stock(tmp_path, tiny_folder)
    monkeypatch.setattr(parallel.Team, "alone", False)
    monkeypatch.setattr(parallel.Team, "barrier", lambda self: None)
    with pytest.raises(ConfigError, match=r"tune\.offload is optimiser"):
        tune(offload=("optimiser",)).run(book)


BASES: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "some": {"targets": ("q", "v", "down"), "rslora": True, "last_layers": 1},
    "whole": {"whole": ("embed",), "offload": ("base", "optimiser")},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
    "prompt": {"method": "prompt", "virtual_tokens": 3, "batch": 2},
}


@pytest.mark.parametrize("way", BASES)
def test_a_base_on_disk_teaches_the_same_bytes(way: str, tmp_path: Path, tiny_folder: Path):
    settings: dict[str, Any] = {"learning_rate": 1e-3, "dropout": 0.0} | BASES[way]
    made = []
    for away in ((), settings.pop("offload", ("base",))):
        book, _, _ = stock(tmp_path / "+".join(("book", *away)), tiny_folder)
        Rows(rows=("who are you|I am", "hello you|你好 model"), keep=True).run(book, name="keep")
        made.append(tune(data=("rows", "keep"), **settings, offload=away).run(book))
    memory, disk = made
    assert files(disk.path) == files(memory.path) and disk.id == memory.id
    assert disk.metrics["weights_bytes"] < memory.metrics["weights_bytes"]


def test_a_base_of_other_numbers_is_made_anew_block_by_block(tmp_path: Path, tiny_folder: Path):
    """A GGUF of 4 bits, dequantised; and matrices that their file keeps as one, taken apart."""
    save_gguf(load_decoder(tiny_folder), None, tmp_path / "model.gguf", "Q4_0")
    folders = [written(name, tmp_path / name) for name in ("baichuan", "mixtral", "gpt2")]
    for path in (tmp_path / "model.gguf", *folders):
        whole = load_decoder(path)
        streamed = load_decoder(path, streamed=True)
        streamed.recompute = True
        ids, layout = torch.arange(9), Packed((4, 5))
        with torch.no_grad():
            assert torch.equal(streamed(ids, layout), whole(ids, layout))
        assert streamed.streamed is not None and streamed.streamed.here == len(whole.blocks) - 1
        empty, full = (
            sum(w.untyped_storage().nbytes() for w in block.parameters() if w.ndim > 1)
            for block in (streamed.blocks[0], whole.blocks[0])
        )
        assert empty < full / 100


def written(name: str, folder: Path) -> Path:
    """A small random model of this description, as its makers lay it out."""
    source = json.loads((FIXTURES / f"{name}.json").read_text())
    family = by_source(source, name)
    decoder = build(family.config(source, name))
    decoder.family = family.name
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
    save_hf(decoder, None, folder, torch.float32)
    return folder


#: loads 410 MB of bfloat16 in 12 blocks, tunes an adapter on few tokens, and prints what was held at most
LARGE = """
import hashlib, json, sys, tempfile
from pathlib import Path
from herdbook.model.checkpoint import load_decoder
from herdbook.model.lora import apply_lora
from herdbook.tokens.chat import Rendering
from herdbook.training import loop, memory
from herdbook.training.objective import NextToken
from test_loop import PLAN
import torch
torch.set_num_threads(1)
folder, streamed = Path(sys.argv[1]), sys.argv[2] == "disk"
rows = [Rendering([(7 * n + k) % 64 for k in range(6)], [True] * 6) for n in range(4)]
PLAN = PLAN.__class__(**(vars(PLAN) | {"steps": 2, "batch": 4, "pack": 32}))
torch.randn(2000, 2000).bfloat16() @ torch.randn(2000, 9).bfloat16()
before = memory.held_bytes()
with memory.Peak() as peak, tempfile.TemporaryDirectory() as work:
    decoder = load_decoder(folder, dtype=torch.bfloat16, streamed=streamed)
    decoder.recompute = True
    decoder.train()
    apply_lora(decoder, targets=("q", "k", "v", "o", "gate", "up", "down"), rank=4, alpha=8)
    moving = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
    state = loop.train(NextToken(decoder), moving, rows, PLAN, Path(work))
learnt = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in moving.values())).hexdigest()
losses = [one["loss"] for one in state.records]
print(json.dumps({"held": peak.bytes - before, "learnt": learnt, "losses": losses}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="counts memory as Linux tells it"
)
def test_a_base_on_disk_holds_a_block_at_a_time(tmp_path: Path):
    block = large_model(tmp_path, layers=12)
    memory, disk = (
        json.loads(program(LARGE, str(tmp_path), where)) for where in ("memory", "disk")
    )
    assert disk["losses"] == memory["losses"] and disk["learnt"] == memory["learnt"]
    assert memory["held"] > 12 * block
    assert memory["held"] - disk["held"] > 10.5 * block  # besides, there are torch's own kernels


def large_model(folder: Path, layers: int) -> int:
    """A LLaMA of so many blocks, its weights a few numbers again and again; bytes of a block."""
    config = LARGE_CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, width),
        "model.norm.weight": (width,),
    }
    for n in range(layers):
        one = f"model.layers.{n}"
        shapes |= {f"{one}.self_attn.{m}_proj.weight": (width, width) for m in "qkvo"}
        shapes |= {f"{one}.mlp.{m}_proj.weight": (inner, width) for m in ("gate", "up")}
        shapes[f"{one}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{one}.{m}_layernorm.weight": (width,) for m in ("input", "post_attention")}
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(inner * width, generator=draw).mul_(0.02).bfloat16()

    def values(name: str) -> memoryview:
        return as_bytes(some[: math.prod(shapes[name])])

    plan = {name: ("BF16", shape) for name, shape in shapes.items()}
    safetensors.write(folder / "model.safetensors", plan, values, {"format": "pt"})
    return 2 * (4 * width * width + 3 * inner * width)


LARGE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8,
    "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_plan_counts_one_block(tiny_folder: Path):
    checkpoint = open_checkpoint(tiny_folder)
    load = Load((64,) * 20, 600, several=True)
    whole, disk = (
        planning.memory_of(checkpoint, tune(dropout=0.0, recompute=True, offload=some), load, 0)
        for some in ((), ("base",))
    )
    source: Any = SimpleNamespace(path=tiny_folder, ref="tiny")
    how = tune(offload=("base",))
    decoder = how._load(source, planning.dtype_of(how))
    methods.prepare(decoder, how)
    assert disk.weights == held_bytes(decoder, streamed=True) < whole.weights
    assert disk.peak - whole.peak == pytest.approx(disk.weights - whole.weights, rel=0.01)
    assert {"offload": ("base",)} in list(fitting.milder(tune(), 64))


@pytest.mark.parametrize(
    "changes", [{"method": "full"}, {"base": "nf4"}, {"base": "packaged"}, {"dora": True}]
)
def test_what_cannot_be_read_as_it_computes_is_refused(changes: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"tune\.offload is base and tune\.(method|base|dora)"):
        tune(offload=("base",), **changes).check()


def test_classifiers_and_other_families_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"classify\.offload is base"):
        classify(tmp_path, offload=("base",)).check()
    for family in ("rwkv", "t5"):
        with pytest.raises(FamilyError, match="are not streamed"):
            load_decoder(written(family, tmp_path / family), streamed=True)
