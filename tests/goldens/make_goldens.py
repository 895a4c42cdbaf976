"""Write the golden models: tiny random checkpoints and what transformers makes of them.

  python tests/goldens/make_goldens.py [VARIANT ...]

Run from the root of the repository, with torch and transformers 5 (a CPU, a minute).
Each variant becomes a folder next to this file:

  config.json, generation_config.json, *.safetensors   as transformers 5 saves them
  config.legacy.json   the same model as transformers 4 spelled it; checked to give
                       transformers the identical logits
  expected.npz         what transformers computes in float32 with eager attention:
    tokens_i, logits_i    one forward pass without a cache: [B, T], [B, T, V]
    prompt_j              the prompt of a greedy run: [P]
    greedy_j              `generate` with its cache, no stop token: [64]
    greedy_uncached_j     argmax of a full forward pass per token: [64]
    gap_j                 best minus second best logit of each such pass: [64]

Every run starts from a freshly loaded model, since dynamic RoPE keeps state. The seed
of the weights is the first one whose greedy runs are varied (DISTINCT tokens), have no
near-ties (GAP) and, where positions are encoded the same way at every length, do not
depend on the cache. Nothing here is needed to run the tests.
"""

import dataclasses
import json
import math
import pathlib
import platform
import shutil
import sys
import tempfile

import numpy as np
import torch
import transformers

ROOT = pathlib.Path(__file__).parent
NEW_TOKENS = 64
DISTINCT = 10  # tokens in a greedy run, at least
GAP = 1e-3  # between the two best logits, at least
VOCAB = 64
SEEDS = 1000  # to try for each variant
LEGACY_VERSION = "4.47.0"
NEW_KEYS = (  # that transformers 4 did not write
    "rope_parameters",
    "layer_types",
    "dtype",
    "use_bidirectional_attention",
    "_sliding_window_pattern",  # not what layer_types says: the class's default
)

SLIDING, FULL = "sliding_attention", "full_attention"
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One golden model.

    Attributes:
      note: what it covers, for versions.json.
      model_type: transformers' name of the architecture.
      config: fields on top of BASE, as transformers 5 spells them.
      lengths: tokens T of the forward passes; the first one has a batch of two.
      prompts: tokens P of the greedy runs.
      legacy: fields that replace or extend the derived legacy spelling.
      legacy_drops: fields that files of that time do not have.
      legacy_type_key: "type" in the oldest files' rope_scaling.
      gain: std of a matrix times the root of its inputs.
      embedding_std: std of the token embeddings.
      dtype: of the saved weights.
      max_shard_size: splits the weights into several files.
    """

    note: str
    model_type: str
    config: dict
    lengths: tuple[int, ...] = (12, 40)
    prompts: tuple[int, ...] = (5,)
    legacy: dict = dataclasses.field(default_factory=dict)
    legacy_drops: tuple[str, ...] = ()
    legacy_type_key: str = "rope_type"
    gain: float = 1.75
    embedding_std: float = 0.4
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"

    @property
    def changes_with_length(self) -> bool:
        """Whether a position's encoding depends on the length of the sequence."""
        rope_type = self.config["rope_parameters"].get("rope_type")
        return rope_type in ("dynamic", "longrope")


def rope(theta: float, rope_type: str = "default", **fields) -> dict:
    """`rope_parameters` as transformers 5 spells them."""
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


def ramp(count: int, first: float, last: float) -> list[float]:
    """Distinct factors, one for each pair of rotated dimensions."""
    return [round(x, 3) for x in np.linspace(first, last, count).tolist()]


LLAMA3 = rope(
    500000.0,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LLAMA3_STOPS = {"eos_token_id": [3, 7, 9]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
QWEN = {"use_sliding_window": False, "max_window_layers": 2}
QWEN_LEGACY = {"sliding_window": 8}  # switched off, but in the file
FOUR_LAYERS = {"num_hidden_layers": 4, "intermediate_size": 16, "sliding_window": 8}
TIED = {"tie_word_embeddings": True}
LONGROPE = {
    "original_max_position_embeddings": 96,
    "max_position_embeddings": 384,
    "rope_parameters": rope(
        10000.0,
        "longrope",
        short_factor=ramp(4, 1.0, 1.6),
        long_factor=ramp(4, 1.2, 4.0),
        original_max_position_embeddings=96,
    ),
}
PHI4 = {
    "hidden_size": 32,
    "num_attention_heads": 2,  # heads of 16: Phi has no head_dim of its own
    "num_key_value_heads": 1,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 128,
    "rope_parameters": rope(
        10000.0,
        "longrope",
        partial_rotary_factor=0.75,
        short_factor=ramp(6, 1.0, 1.5),
        long_factor=ramp(6, 1.1, 5.0),
        original_max_position_embeddings=32,
    ),
}
GEMMA2 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 2,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "rope_parameters": rope(10000.0),
}
GEMMA3 = {
    "head_dim": 8,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 2,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "rope_parameters": {FULL: rope(1000000.0), SLIDING: rope(10000.0)},
}
GEMMA3_LINEAR = {
    "rope_parameters": {
        FULL: rope(1000000.0, "linear", factor=8.0),
        SLIDING: rope(10000.0),
    }
}
GEMMA3_LEGACY = {"sliding_window_pattern": 3}
TIE_DROPPED = ("tie_word_embeddings",)  # tied by default, so not in the file

VARIANTS = {
    "llama2": Variant(
        "multi-head attention, untied",
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": rope(10000.0)},
        legacy_drops=("head_dim", "mlp_bias", "attention_bias", "num_key_value_heads"),
    ),
    "llama3_1": Variant(
        "llama3 RoPE, grouped queries, several stop tokens",
        "llama",
        {"rope_parameters": LLAMA3, **LLAMA3_STOPS},
        lengths=(12, 96),
        prompts=(5, 40),
        legacy_drops=("head_dim",),
    ),
    "llama3_2": Variant(
        "llama3 RoPE with frequencies in its smoothed band, tied",
        "llama",
        {
            "rope_parameters": LLAMA3,
            "head_dim": 20,
            "intermediate_size": 16,
            **LLAMA3_STOPS,
            **TIED,
        },
        lengths=(12, 96),
        prompts=(5, 40),
    ),
    "llama_linear": Variant(
        "linear RoPE; legacy: the key type",
        "llama",
        {
            "max_position_embeddings": 128,
            "rope_parameters": rope(10000.0, "linear", factor=4.0),
        },
        lengths=(12, 96),
        prompts=(5, 40),
        legacy_drops=("head_dim",),
        legacy_type_key="type",
    ),
    "llama_dynamic": Variant(
        "dynamic RoPE: cached and uncached greedy runs may differ beyond 32 tokens",
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": rope(10000.0, "dynamic", factor=2.0),
        },
        lengths=(20, 32, 33, 96),
        prompts=(5, 40),
        legacy_drops=("head_dim",),
    ),
    "llama_yarn": Variant(
        "yarn RoPE with its defaults; theta 100 puts a frequency on the ramp",
        "llama",
        {
            "max_position_embeddings": 128,
            "rope_parameters": rope(100.0, "yarn", **YARN),
        },
        lengths=(12, 96),
        prompts=(5, 40),
    ),
    "llama_yarn_full": Variant(
        "yarn RoPE with every optional key",
        "llama",
        {
            "max_position_embeddings": 128,
            "rope_parameters": rope(
                10000.0,
                "yarn",
                **YARN,
                beta_fast=2.0,
                beta_slow=0.25,
                attention_factor=1.3,
                truncate=False,
            ),
        },
        lengths=(12, 96),
        prompts=(5, 40),
    ),
    "tinyllama": Variant(
        "one key/value head, untied",
        "llama",
        {"num_key_value_heads": 1, "rope_parameters": rope(10000.0)},
        legacy_drops=("head_dim", "mlp_bias"),
    ),
    "smollm2": Variant(
        "Llama, tied, theta 100000; legacy: keys that no class reads",
        "llama",
        {"rope_parameters": rope(100000.0), **TIED},
        legacy={"is_llama_config": True, "rope_interleaved": False},
        legacy_drops=("head_dim",),
    ),
    "mistral": Variant(
        "a window of 8 in every layer",
        "mistral",
        {"sliding_window": 8, "rope_parameters": rope(10000.0)},
        legacy_drops=("head_dim",),
    ),
    "mistral_nemo": Variant(
        "no window, head_dim 16 is not hidden_size / heads",
        "mistral",
        {
            "sliding_window": None,
            "head_dim": 16,
            "rope_parameters": rope(1000000.0),
        },
    ),
    "qwen2": Variant(
        "biases of q, k and v, tied; legacy: a window that is switched off",
        "qwen2",
        {"rope_parameters": rope(1000000.0), **QWEN, **TIED},
        legacy=QWEN_LEGACY,
    ),
    "qwen2_yarn": Variant(
        "yarn RoPE, untied",
        "qwen2",
        {
            "max_position_embeddings": 128,
            "rope_parameters": rope(1000000.0, "yarn", **YARN),
            **QWEN,
        },
        lengths=(12, 96),
        prompts=(5, 40),
        legacy=QWEN_LEGACY,
    ),
    "qwen2_window": Variant(
        "a window of 8 in the layers from max_window_layers on",
        "qwen2",
        {
            **FOUR_LAYERS,
            "use_sliding_window": True,
            "max_window_layers": 2,
            "rope_parameters": rope(1000000.0),
            **TIED,
        },
    ),
    "qwen3": Variant(
        "norms of q and k, head_dim 16, tied, sharded weights",
        "qwen3",
        {"head_dim": 16, "rope_parameters": rope(1000000.0), **QWEN, **TIED},
        legacy=QWEN_LEGACY,
        max_shard_size="32KB",
    ),
    "phi3": Variant(
        "fused qkv and gate_up, a window of 8",
        "phi3",
        {"sliding_window": 8, "rope_parameters": rope(10000.0)},
    ),
    "phi3_longrope": Variant(
        "longrope: other factors beyond 96 tokens; legacy: the key type",
        "phi3",
        LONGROPE,
        lengths=(20, 96, 97, 288),
        prompts=(5, 80, 100),
        legacy_type_key="type",
    ),
    "phi4_mini": Variant(
        "longrope beyond 32 tokens on 12 of 16 dimensions, tied",
        "phi3",
        {**PHI4, **TIED},
        lengths=(20, 32, 33, 96),
        prompts=(5, 40),
        embedding_std=0.3,
    ),
    "gemma": Variant(
        "one key/value head of 16, tied; legacy: gelu means its tanh form",
        "gemma",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope(10000.0),
            **TIED,
        },
        legacy={"hidden_act": "gelu", "hidden_activation": None},
        legacy_drops=TIE_DROPPED,
        embedding_std=0.2,
    ),
    "gemma2": Variant(
        "soft caps, post norms, every other layer with a window of 8",
        "gemma2",
        {**FOUR_LAYERS, **GEMMA2, **TIED},
        legacy={"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
        legacy_drops=TIE_DROPPED,
        embedding_std=0.15,
    ),
    "gemma3": Variant(
        "norms of q and k, one layer in three without a window and with its own theta",
        "gemma3_text",
        {**FOUR_LAYERS, **GEMMA3, **TIED},
        legacy=GEMMA3_LEGACY,
        legacy_drops=TIE_DROPPED,
        embedding_std=0.15,
    ),
    "gemma3_linear": Variant(
        "linear RoPE in the layers without a window",
        "gemma3_text",
        {**FOUR_LAYERS, **GEMMA3, **GEMMA3_LINEAR, **TIED},
        lengths=(12, 96),
        prompts=(5, 40),
        legacy=GEMMA3_LEGACY,
        legacy_drops=TIE_DROPPED,
        embedding_std=0.15,
    ),
    "llama_bf16": Variant(
        "weights in bfloat16, computed in float32",
        "llama",
        {"rope_parameters": rope(10000.0)},
        dtype=torch.bfloat16,
    ),
    "seed_oss": Variant(
        "biases of q, k and v but not of o; legacy: rope_type default",
        "seed_oss",
        {
            "head_dim": 16,
            "attention_bias": True,
            "attention_out_bias": False,
            "rope_parameters": rope(10000000.0),
            **TIED,
        },
        legacy={"rope_scaling": {"rope_type": "default"}},
    ),
    "ministral": Variant(
        "layer_types: one with a window of 8, one without",
        "ministral",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": [SLIDING, FULL],
            "rope_parameters": rope(1000000.0),
        },
        legacy={"layer_types": [SLIDING, FULL]},
    ),
}


def draw_model(variant: Variant, seed: int) -> transformers.PreTrainedModel:
    """A model of random weights, large enough to make greedy tokens vary."""
    config = transformers.AutoConfig.for_model(
        variant.model_type, **{**BASE, **variant.config}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:  # norms and biases, around what they begin as
            weight.data += 0.3 * noise
        elif "embed_tokens" in name:
            weight.data = variant.embedding_std * noise
        else:
            weight.data = variant.gain / math.sqrt(weight.shape[1]) * noise
    return model.to(variant.dtype)


def load(folder: pathlib.Path) -> transformers.PreTrainedModel:
    """A fresh model in float32, free of the state of earlier passes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def random_tokens(seed: int, batch: int, length: int) -> torch.Tensor:
    """Tokens [B, T]."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def forward_passes(variant: Variant, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """tokens_i and logits_i for each of the variant's lengths."""
    arrays = {}
    for i, length in enumerate(variant.lengths):
        tokens = random_tokens(i, 2 if i == 0 else 1, length)
        logits = load(folder)(tokens, use_cache=False).logits
        arrays[f"tokens_{i}"] = tokens.numpy().astype(np.int32)
        arrays[f"logits_{i}"] = logits.numpy().astype(np.float32)
    return arrays


def top_gap(logits: torch.Tensor) -> float:
    """How far the best logit of [V] is above the second best."""
    best, second = torch.topk(logits, 2).values.tolist()
    return best - second


def cached_run(
    folder: pathlib.Path, prompt: torch.Tensor
) -> tuple[list[int], list[float]]:
    """The tokens that `generate` appends with its cache, and their gaps."""
    model = load(folder)
    model.generation_config.eos_token_id = None
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, prompt.shape[1] :].tolist()
    assert len(tokens) == NEW_TOKENS
    return tokens, [top_gap(logits[0]) for logits in output.logits]


def uncached_run(
    folder: pathlib.Path, prompt: torch.Tensor
) -> tuple[list[int], list[float]]:
    """The tokens of one full forward pass each, and their gaps."""
    model, tokens, gaps = load(folder), prompt, []
    for _ in range(NEW_TOKENS):
        logits = model(tokens, use_cache=False).logits[0, -1]
        gaps.append(top_gap(logits))
        tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
    return tokens[0, prompt.shape[1] :].tolist(), gaps


def greedy_runs(variant: Variant, folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of the greedy runs; None if one of them is unfit for a test."""
    arrays = {}
    for j, length in enumerate(variant.prompts):
        prompt = random_tokens(100 + j, 1, length)
        uncached, gaps = uncached_run(folder, prompt)
        if len(set(uncached)) < DISTINCT or min(gaps) < GAP:
            return None
        cached, cached_gaps = cached_run(folder, prompt)
        if len(set(cached)) < DISTINCT or min(cached_gaps) < GAP:
            return None
        if cached != uncached and not variant.changes_with_length:
            return None
        arrays[f"prompt_{j}"] = prompt[0].numpy().astype(np.int32)
        arrays[f"greedy_{j}"] = np.array(cached, np.int32)
        arrays[f"greedy_uncached_{j}"] = np.array(uncached, np.int32)
        arrays[f"gap_{j}"] = np.array(gaps, np.float32)
    return arrays


def legacy_spelling(variant: Variant, config: dict) -> dict:
    """The config as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    dropped = NEW_KEYS + variant.legacy_drops
    old = {key: value for key, value in config.items() if key not in dropped}
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = LEGACY_VERSION
    scaling = dict(config["rope_parameters"])
    if SLIDING in scaling:
        old["rope_local_base_freq"] = scaling[SLIDING]["rope_theta"]
        scaling = dict(scaling[FULL])
    old["rope_theta"] = scaling.pop("rope_theta")
    partial = scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        old["partial_rotary_factor"] = partial
    if "original_max_position_embeddings" in old:
        scaling.pop("original_max_position_embeddings", None)
    rope_type = scaling.pop("rope_type")
    named = {variant.legacy_type_key: rope_type, **scaling}
    old["rope_scaling"] = None if rope_type == "default" else named
    return dict(sorted({**old, **variant.legacy}.items()))


def check_legacy(variant: Variant, folder: pathlib.Path, expected: dict) -> None:
    """transformers reads the legacy spelling as the same model."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary) / "model"
        shutil.copytree(folder, copy)
        (copy / "config.legacy.json").replace(copy / "config.json")
        for key, array in forward_passes(variant, copy).items():
            np.testing.assert_array_equal(array, expected[key], err_msg=key)


def make_variant(name: str, variant: Variant) -> str:
    """Write the variant's folder; returns a line about it."""
    folder = ROOT / name
    for seed in range(SEEDS):
        shutil.rmtree(folder, ignore_errors=True)
        draw_model(variant, seed).save_pretrained(
            folder, max_shard_size=variant.max_shard_size
        )
        greedy = greedy_runs(variant, folder)
        if greedy is not None:
            break
    else:
        raise RuntimeError(f"{name}: no seed below {SEEDS} gives fit greedy runs")
    config = json.loads((folder / "config.json").read_text())
    legacy = json.dumps(legacy_spelling(variant, config), indent=2)
    (folder / "config.legacy.json").write_text(legacy + "\n")
    forward = forward_passes(variant, folder)
    check_legacy(variant, folder, forward)
    np.savez_compressed(folder / "expected.npz", **forward, **greedy)
    return f"{name:16} seed {seed:4} {summary(folder, forward, greedy)}"


def summary(folder: pathlib.Path, forward: dict, greedy: dict) -> str:
    """Size, extremes and greedy runs of a written folder, in words."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    logits = [forward[key] for key in forward if key.startswith("logits")]
    gap = min(greedy[key].min() for key in greedy if key.startswith("gap"))
    runs = range(sum(key.startswith("prompt") for key in greedy))
    differ = [
        len(greedy[f"prompt_{j}"])
        for j in runs
        if (greedy[f"greedy_{j}"] != greedy[f"greedy_uncached_{j}"]).any()
    ]
    return (
        f"{size / 1000:6.1f} kB  |logit| <= {max(abs(x).max() for x in logits):5.2f}"
        f"  std {np.mean([x.std() for x in logits]):4.2f}  gap {gap:.4f}"
        f"  cached differs for prompts of {differ}"
    )


def write_versions() -> None:
    """versions.json: what made the goldens, and a line per variant."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "variants": {name: variant.note for name, variant in VARIANTS.items()},
    }
    (ROOT / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def main(names: list[str]) -> None:
    """Write the named variants, or all of them."""
    torch.set_num_threads(1)  # the same sums everywhere
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.inference_mode():
        for name in names or VARIANTS:
            print(make_variant(name, VARIANTS[name]), flush=True)
    write_versions()


if __name__ == "__main__":
    main(sys.argv[1:])
