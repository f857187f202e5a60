"""The section ``model``: what is trained, and how it is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from apo_megatron.config.section import NonNegativeInt, PositiveInt, Section


class ModelConfig(Section):
    """The policy: architecture, tokenizer and initial weights."""

    hf_path: str = Field(description="Directory (or hub id) with config.json, safetensors and tokenizer.")
    megatron_path: str | None = Field(
        None, description="Converted checkpoint to take the weights from; hf_path then gives the rest."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Parameter and compute dtype.")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="Layer implementation; auto takes TransformerEngine on a GPU that has it."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations recomputed in backward: attention core, or whole layers."
    )
    make_vocab_size_divisible_by: PositiveInt = Field(
        128, description="The vocabulary is padded to a multiple of this times tensor_parallel_size."
    )
    max_logits_mib: NonNegativeInt = Field(
        1024,
        description="Logits of a micro-batch that would take more than this on a rank are never made: the LM "
        "head and the loss become one operation, which is slower; 0 = always.",
    )
