"""A small decoder-only language model library for JAX with a documented KV cache."""

from minillm_jax.compilation_cache import (
    use_compilation_cache as use_compilation_cache,
)
from minillm_jax.config import ConfigError as ConfigError
from minillm_jax.config import Configs as Configs
from minillm_jax.config import ModelConfig as ModelConfig
from minillm_jax.decoding.decode import decode_step as decode_step
from minillm_jax.decoding.decode import prefill as prefill
from minillm_jax.decoding.executables import (
    CompileForbiddenError as CompileForbiddenError,
)
from minillm_jax.decoding.generator import Generator as Generator
from minillm_jax.decoding.prompt_cache import PromptCacheError as PromptCacheError
from minillm_jax.decoding.requests import Completion as Completion
from minillm_jax.decoding.requests import Piece as Piece
from minillm_jax.decoding.sampling import SamplingParams as SamplingParams
from minillm_jax.decoding.stream import Session as Session
from minillm_jax.model.cache import CacheOverflowError as CacheOverflowError
from minillm_jax.model.cache import CachePolicy as CachePolicy
from minillm_jax.model.cache import grow_cache as grow_cache
from minillm_jax.model.cache import init_cache as init_cache
from minillm_jax.model.quantized import quantize as quantize
from minillm_jax.model.transformer import MiniLLM as MiniLLM
from minillm_jax.model.transformer import create_model as create_model
from minillm_jax.model.transformer import init_params as init_params
from minillm_jax.planning.memory import MemoryPlan as MemoryPlan
from minillm_jax.planning.memory import plan_memory as plan_memory
from minillm_jax.text.tokenizer import ByteTokenizer as ByteTokenizer
from minillm_jax.text.tokenizer import TokenizerError as TokenizerError
from minillm_jax.text.tokenizer import load_tokenizer as load_tokenizer
from minillm_jax.weights.errors import CheckpointError as CheckpointError
from minillm_jax.weights.load import load_pretrained as load_pretrained
from minillm_jax.weights.save import save_pretrained as save_pretrained
