"""Reading a model from disk and writing one.

A checkpoint is opened (headers, configuration, names checked) before any weight is read; then the
tensors come one by one into their final place and type, so that loading needs the memory of the
result and of one tensor.

    folder/config.json, model.safetensors, or its shards and model.safetensors.index.json
    folder/config.json, pytorch_model.bin, or its shards and pytorch_model.bin.index.json
    folder/params.json, consolidated.00.pth …        Meta's own
    model.gguf
    RWKV-4-….pth
    folder/latest, 49300/mp_rank_00_model_states.pt …  SAT's (GLM-130B)
"""

from herdbook.model.checkpoint.base import Checkpoint as Checkpoint
from herdbook.model.checkpoint.base import expected_shapes as expected_shapes
from herdbook.model.checkpoint.huggingface import INDEX as INDEX
from herdbook.model.checkpoint.huggingface import LEGACY_INDEX as LEGACY_INDEX
from herdbook.model.checkpoint.loading import load_decoder as load_decoder
from herdbook.model.checkpoint.meta import PARAMS as PARAMS
from herdbook.model.checkpoint.opening import open_checkpoint as open_checkpoint
from herdbook.model.checkpoint.saving import gguf_head as gguf_head
from herdbook.model.checkpoint.saving import need_rows as need_rows
from herdbook.model.checkpoint.saving import one_tensor as one_tensor
from herdbook.model.checkpoint.saving import save_compressed as save_compressed
from herdbook.model.checkpoint.saving import save_gguf as save_gguf
from herdbook.model.checkpoint.saving import save_hf as save_hf
from herdbook.model.checkpoint.saving import source_config as source_config
from herdbook.model.checkpoint.saving import tensors as tensors
from herdbook.model.sources import check_vocabulary as check_vocabulary
