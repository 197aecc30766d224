"""Which module computes a configuration: the one decoder, or one of the families that differ from it
by more than axes can say."""

from __future__ import annotations

from herdbook.model.config import DecoderConfig
from herdbook.model.cpm_bee import CPMBee
from herdbook.model.decoder import Decoder
from herdbook.model.own_configs import BeeConfig, RWKVConfig, T5Config
from herdbook.model.rwkv import RWKV
from herdbook.model.t5 import T5

MODULES: dict[type[DecoderConfig], type[Decoder]] = {
    DecoderConfig: Decoder,
    RWKVConfig: RWKV,
    T5Config: T5,
    BeeConfig: CPMBee,
}


def build(config: DecoderConfig, *, headless: bool = False) -> Decoder:
    """A model of this configuration, its weights not yet set."""
    return MODULES[type(config)](config, headless=headless)
