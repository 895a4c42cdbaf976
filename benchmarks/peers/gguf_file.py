"""Hugging Face folders of Llama models as GGUF files, for llama.cpp.

The float32 file is written here, the others are made from it by llama.cpp's own
quantiser, with its defaults: what `llama-quantize` would give.
"""

import ctypes
import pathlib

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
import safetensors.numpy

from benchmarks import peers
from minillm_jax.config import ModelConfig

# Name -> the type of file that llama.cpp calls so.
FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def file(
    folder: pathlib.Path, config: ModelConfig, kind: str, threads: int
) -> pathlib.Path:
    """The GGUF file of a folder, beside it; made where it is not there.

    Args:
      folder: from `save_pretrained`.
      config: its model's.
      kind: "f32", or one of FILE_TYPES.
      threads: that the quantiser takes.

    Raises:
      ConfigError: for a model that is more than Llama's architecture.
    """
    peers.check_plain(config)
    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    if path.exists():
        return path
    new = path.with_suffix(".part")
    if kind == "f32":
        _write(new, folder, config)
    else:
        _quantise(file(folder, config, "f32", threads), new, kind, threads)
    return new.replace(path)


def sizes(path: pathlib.Path) -> tuple[int, int]:
    """Bytes of all tensors in a file, and of the embedding among them."""
    tensors = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    return sum(tensors.values()), tensors["token_embd.weight"]


def _write(path: pathlib.Path, folder: pathlib.Path, config: ModelConfig) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_kv_cache_len)
    writer.add_embedding_length(config.dim_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.dim_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    for part in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.numpy.load_file(part).items():
            writer.add_tensor(_name(name), _arranged(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.weight"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[inner]}.weight"


def _arranged(name: str, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A tensor in float32, its rows in the order that llama.cpp turns them.

    RoPE turns neighbours there, so that the two halves of a head are interleaved.
    """
    tensor = tensor.astype(np.float32)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return tensor
    halves = tensor.reshape(count, 2, config.head_dim // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def _quantise(
    source: pathlib.Path, path: pathlib.Path, kind: str, threads: int
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = threads
    names = (str(source).encode(), str(path).encode())
    failed = llama_cpp.llama_model_quantize(*names, ctypes.pointer(params))
    if failed:
        raise RuntimeError(f"llama.cpp could not make a {kind} file ({failed})")
