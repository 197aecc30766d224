"""Fold an adapter into the model it was trained on: W' = W + (alpha / r) · B A, and as its kind has it.

The sum is made in float32 from the very weights that were trained on. That a merged model is worse
than its adapter is a known accident, and has two causes: the base is loaded for merging in another
precision than for training, or the result is rounded to one (a bfloat16 keeps 8 bits of a weight,
and a small correction falls below them). So the default keeps float32, and rounding is left to the
one place that takes care of it, `Quantise`. A quantised base is dequantised for it, never rounded back
unasked: the step says what the merged model takes, and what rounding to fewer bits cost.

    lora, dora, ia3, whole   float32 holds what was trained; the file grows to 32 bits a weight
    beside nf4               what was trained is the sum with the weights that NF4 rounded, so these
                             are merged into, not the base's own; how far apart the two are is told
    peqa                     other scales in the base's own file: exact, and as small as the base
    prefix, prompt           no change of a weight: refused
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from herdbook.book.step import Bench, Input, Step, require
from herdbook.compression import parity
from herdbook.compression.rescale import check_rescaled, save_rescaled
from herdbook.errors import ConfigError, GateError
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear, Linear
from herdbook.model.lora import merge_lora, replace
from herdbook.model.nf4 import NF4Linear
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import peft_format

#: the largest difference of logits that rounding explains, as a share of the largest logit
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}


@dataclass(frozen=True)
class Merge(Step):
    """Fold an adapter into the model it was trained on, and check that both say the same."""

    kind: ClassVar[str] = "model"
    changes: ClassVar[tuple[str, ...]] = ("adapter", "model")

    #: the base, and the adapter that was trained on it
    model: Input = ""
    adapter: Input = ""
    #: of the saved weights: float32 loses nothing; the others halve the file
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "model", "adapter")
        source, adapter = bench.artifact("model"), bench.artifact("adapter")
        if adapter.kind != "adapter":
            raise ConfigError(
                f"{adapter.ref} is a {adapter.kind}",
                rule="and only an adapter can be merged",
                next="leave the step out where tuning was in full: its result is a model already",
            )
        if source.id not in adapter.parents:
            base = next(
                (p.ref for p in bench.book.parents(adapter) if p.kind == "model"), "another"
            )
            raise ConfigError(
                f"adapter {adapter.ref} was trained on {base}",
                rule=f"not on {source.ref}",
                next=f"merge it into {base}",
            )
        tokenizer = Tokenizer.load(source.path) if Tokenizer.exists(source.path) else None
        if peft_format.method(adapter.path) == "PEQA":
            return self._rescale(bench, tokenizer)
        nf4 = peft_format.kept(adapter.path) == "nf4"
        decoder = load_decoder(source.path, dtype=torch.float32, nf4=nf4)
        merged = peft_format.load(decoder, adapter.path)
        beside = parity.text_logits(decoder, tokenizer)
        if nf4:
            self._say_nf4(bench, tokenizer, beside)
            make_dense(decoder)
        merge_lora(decoder)
        save_hf(decoder, tokenizer, bench.out, getattr(torch, self.dtype))
        del decoder
        saved = load_decoder(bench.out, dtype=torch.float32)
        found = parity.compare(beside, parity.text_logits(saved, tokenizer))
        bound = TOLERANCE[self.dtype] * found.scale
        if not found.max_logit_difference <= bound:
            raise GateError(
                f"the merged model's logits differ by {found.max_logit_difference:.3g} from those "
                f"of the model with its adapter beside it",
                rule=f"more than {bound:.3g}, which {self.dtype} explains",
                next="set dtype to float32" if self.dtype != "float32" else "please report this",
            )
        before, after = _weights(source.path), _weights(bench.out)
        if after > before:
            bench.progress.say(
                f"the base's weights take {before:,} bytes, the merged model's {after:,} in "
                f"{self.dtype}; for fewer go on with Quantise, which measures what rounding loses "
                "(an adapter trained with group 32 loses nothing in Q4_1), or serve the adapter "
                "beside its base, unmerged"
            )
        if self.dtype != "float32":
            bench.progress.say(
                f"rounded to {self.dtype}: the logits moved by up to {found.max_logit_difference:.3g} "
                f"of {found.scale:.3g}; float32 keeps all that was learnt"
            )
        return _metrics(found, len(merged), saved, bench.out)

    def _say_nf4(self, bench: Bench, tokenizer: Tokenizer | None, trained: Tensor) -> None:
        """How far the adapter on the base's own weights is from what was trained."""
        decoder = load_decoder(bench.artifact("model").path, dtype=torch.float32)
        peft_format.load(decoder, bench.artifact("adapter").path)
        found = parity.compare(trained, parity.text_logits(decoder, tokenizer))
        bench.progress.say(
            "the adapter was trained beside weights rounded to NF4, and is merged into these; on the "
            f"base's own it would say something else: mean KL {found.mean_kl:.3g}, "
            f"the same next token {found.top1_agreement:.1%} of the time"
        )

    def _rescale(self, bench: Bench, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """PEQA: the base's codes with the trained scales, in the base's layout."""
        if self.dtype != "float32":
            raise ConfigError(
                f"merge.dtype is {self.dtype}",
                rule="but scales go into the base's own file, whose format stays",
                next="leave dtype out",
            )
        source = bench.artifact("model").path
        decoder = load_decoder(source, dtype=torch.float32, quantised=True)
        merged = peft_format.load(decoder, bench.artifact("adapter").path)
        for layer in decoder.modules():
            if isinstance(layer, Int4Linear):
                layer.has_kernel = False  # it computes in bfloat16
        beside = parity.text_logits(decoder, tokenizer)
        merge_lora(decoder)
        save_rescaled(decoder, tokenizer, source, bench.out)
        saved = check_rescaled(decoder, bench.out)
        found = parity.compare(beside, parity.text_logits(saved, tokenizer))
        if found.max_logit_difference:
            raise GateError(
                f"the merged model's logits differ by {found.max_logit_difference:.3g}",
                rule="though its weights are those that were trained",
                next="please report this",
            )
        return _metrics(found, len(merged), saved, bench.out)


def _metrics(found: parity.Parity, merged: int, saved: Decoder, out: Path) -> dict[str, Any]:
    return {
        "max_logit_difference": found.max_logit_difference,
        "mean_kl": found.mean_kl,
        "top1_agreement_share": found.top1_agreement,
        "merged_matrices": merged,
        "parameters": saved.parameter_count(),
        "size_bytes": sum(f.stat().st_size for f in out.iterdir()),
    }


def make_dense(decoder: Decoder) -> None:
    """Replace the matrices in NF4 below adapters by the dense ones that they stand for."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, NF4Linear):
            dense = Linear(layer.inputs, layer.outputs, layer.bias is not None)
            dense.weight = nn.Parameter(layer.plain(), requires_grad=False)
            dense.bias = layer.bias
            replace(decoder, name, dense)


def _weights(folder: Path) -> int:
    """Bytes of the folder's weights, in whichever format."""
    kinds = (".safetensors", ".gguf", ".bin")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)
