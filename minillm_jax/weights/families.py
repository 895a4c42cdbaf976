"""The architectures of Hugging Face folders, as data.

A family says what its config.json leaves unsaid: what transformers takes for a key that
is not there, and which fields of a ModelConfig all of its models share.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    model_type: str
    # Fields of a ModelConfig that config.json does not tell: they make the family.
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Keys of config.json -> what is taken where they are not there; None = not set.
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    windows: str = "none"  # a sliding window in "none", "all" or "some" layers
    # RoPE has an entry for each type of layer, in files of transformers 5.
    rope_by_layer: bool = False
    rope_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")
    fused: bool = False  # q, k and v in one tensor, gate and up in another
    divides: bool = False  # transformers asks that the heads divide the model dim
    # Of a model that is the text part of another: the section of config.json, what its
    # tensors' names begin with there -> alone, and the other parts' begin with.
    section: str | None = None
    whole_type: str | None = None  # its model_type
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()


_ANY = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
_WINDOWS = {
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
    "eos_token_id": None,
}
_GEMMA = {
    **_ANY,
    "head_dim": 256,
    "num_key_value_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
}
_GEMMA_2 = {
    **{key: value for key, value in _GEMMA.items() if key != "hidden_act"},
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_FIELDS = {"norm_unit_offset": True}

_GEMMA_3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fields={**_GEMMA_FIELDS, "post_norms": True, "qk_norm": True},
    keys={
        # Whose soft-cap of the scores transformers has in the config, and leaves out.
        **{k: v for k, v in _GEMMA_2.items() if k != "attn_logit_softcapping"},
        "num_attention_heads": 8,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
    windows="some",
    rope_by_layer=True,
    divides=True,
)

# In the order in which a config looks for one that can express it.
FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        keys={**_ANY, "max_position_embeddings": 2048},
        divides=True,
    ),
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        keys={
            **_ANY,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        windows="all",
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        fields={"qkv_bias": True},
        keys={**_ANY, **_WINDOWS, "num_key_value_heads": 32},
        windows="some",
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        fields={"qk_norm": True},
        keys={**_ANY, **_WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
        windows="some",
    ),
    Family(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        keys={
            **_ANY,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32000,
            "sliding_window": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        windows="all",
        rope_types=("longrope",),
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # when Phi-3 came out
        partial_rotary=True,
        fused=True,
    ),
    Family(
        architecture="MinistralForCausalLM",
        model_type="ministral",
        keys={
            **_ANY,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "layer_types": None,
            "max_position_embeddings": 131072,
        },
        windows="some",
    ),
    Family(
        architecture="SeedOssForCausalLM",
        model_type="seed_oss",
        keys={
            **_ANY,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "max_position_embeddings": 524288,
        },
    ),
    Family(
        architecture="GemmaForCausalLM",
        model_type="gemma",
        fields=_GEMMA_FIELDS,
        keys=_GEMMA,
    ),
    Family(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        fields={**_GEMMA_FIELDS, "post_norms": True},
        keys=_GEMMA_2,
        windows="some",
        divides=True,
    ),
    _GEMMA_3,
    dataclasses.replace(
        _GEMMA_3,
        architecture="Gemma3ForConditionalGeneration",
        # transformers leaves out this soft-cap too, where there are images.
        keys={k: v for k, v in _GEMMA_3.keys.items() if k != "final_logit_softcapping"},
        section="text_config",
        whole_type="gemma3",
        prefixes={"language_model.": "", "model.language_model.": "model."},
        others=(
            *("vision_tower.", "multi_modal_projector."),  # transformers 4
            *("model.vision_tower.", "model.multi_modal_projector."),  # and 5
        ),
    ),
)

# Keys that say nothing about what is computed in a forward pass.
HARMLESS = frozenset(
    [
        *(
            "architectures",
            "model_type",
            "transformers_version",
            "torch_dtype",
            "dtype",
        ),
        *(
            "auto_map",
            "use_cache",
            "initializer_range",
            "name_or_path",
            "pretraining_tp",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
        *("sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
        *("begin_suppress_tokens", "tokenizer_class", "model_max_length", "prefix"),
        # dropout: of training
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
        *("residual_dropout", "hidden_dropout_prob", "classifier_dropout"),
        # generation: not of the model
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty"),
        *("length_penalty", "no_repeat_ngram_size", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "max_length", "min_length", "do_sample"),
        *("early_stopping", "num_return_sequences", "exponential_decay_length_penalty"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "cache_implementation"),
        # of other tasks and tools
        *("return_dict", "return_dict_in_generate", "output_attentions"),
        *("output_hidden_states", "output_scores", "torchscript", "id2label"),
        *("label2id", "problem_type", "task_specific_params", "finetuning_task"),
        *("chunk_size_feed_forward", "pruned_heads", "attn_implementation"),
        *("is_llama_config", "transformers.js_config", "unsloth_version"),
        *("unsloth_fixed", "model_name", "max_sequence_length", "torch_compile"),
    ]
)
# Keys that matter, and the values at which they do not.
NEUTRAL = {"full_attn_mod": (1,), "interpolate_factor": (1, 1.0)}
# Keys that would matter at false, where others are then switched off.
NOT_FALSE = ("is_causal", "use_rope", "causal")


def by_name(values: Mapping[str, Any]) -> Family | None:
    """The family of a config.json: its first architecture, or else its model type."""
    names = values.get("architectures") or []
    for family in FAMILIES:
        if isinstance(names, list) and names[:1] == [family.architecture]:
            return family
        if not names and values.get("model_type") == family.model_type:
            return family  # the first: no family of a part
    return None
