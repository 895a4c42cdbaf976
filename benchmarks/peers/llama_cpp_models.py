"""llama.cpp by its C interface: weights in float32, bfloat16, Q8_0 and Q4_0.

All rows are sequences of one context, each with its own part of the cache. The cache is
float32 beside float32 weights, and else float16, llama.cpp's default.
"""

import ctypes
import pathlib
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.peers import gguf_file
from minillm_jax.config import ModelConfig

# Of one call, which llama.cpp itself cuts into parts of 512: its own defaults.
BATCH_TOKENS, PART_TOKENS = 2048, 512


class Batch:
    """The tokens of one call."""

    def __init__(self) -> None:
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def fill(self, tokens: Any, rows: Any, positions: Any, outputs: Any) -> None:
        """Sets the tokens; one list each of equal length."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, row, position, output) in enumerate(
            zip(tokens, rows, positions, outputs, strict=True)
        ):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = output


class LlamaCpp:
    """A model and, for each shape, a context; tokens are chosen in NumPy."""

    def __init__(self, path: pathlib.Path, config: ModelConfig, threads: int):
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if model is None:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self._model = model
        self._config, self._threads = config, threads
        self._weights_bytes, self._embedding_bytes = gguf_file.sizes(path)
        self._wide = path.stem.endswith("f32")
        self._batch = Batch()
        self._context: Any = None
        self._first = np.zeros((0,), np.int32)
        self._prompt_tokens = 0

    def begin(self, batch_size: int, context: int) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch_size * (-(-context // 256) * 256)
        params.n_seq_max = batch_size
        params.n_batch, params.n_ubatch = BATCH_TOKENS, PART_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        if self._wide:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._drop(0)
        rows, length = tokens.shape
        flat = tokens.reshape(-1).tolist()
        first = np.zeros((rows,), np.int32)
        for start in range(0, len(flat), BATCH_TOKENS):
            places = range(start, min(start + BATCH_TOKENS, len(flat)))
            last = [(place + 1) % length == 0 for place in places]
            self._batch.fill(
                flat[places.start : places.stop],
                [place // length for place in places],
                [place % length for place in places],
                last,
            )
            self._run()
            for i in np.flatnonzero(last):
                first[places[i] // length] = self._best(int(i))
        self._first, self._prompt_tokens = first, length
        return first

    def decode(self, steps: int) -> np.ndarray:
        self._drop(self._prompt_tokens)
        rows = len(self._first)
        out = np.zeros((rows, steps), np.int32)
        tokens = self._first.tolist()
        for step in range(steps):
            positions = [self._prompt_tokens + step] * rows
            self._batch.fill(tokens, range(rows), positions, [True] * rows)
            self._run()
            tokens = [self._best(row) for row in range(rows)]
            out[:, step] = tokens
        return out

    def step_bytes(self, batch_size: int, held: int) -> int:
        config = self._config
        read = self._weights_bytes
        if not config.tie_embeddings:
            row = self._embedding_bytes // config.vocab_size
            read -= self._embedding_bytes - batch_size * row
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return read + batch_size * held * per_token * (4 if self._wide else 2)

    def _drop(self, length: int) -> None:
        """Forgets each row's tokens after the first `length`."""
        memory = llama_cpp.llama_get_memory(self._context)
        assert memory is not None
        llama_cpp.llama_memory_seq_rm(memory, -1, length, -1)

    def _run(self) -> None:
        code = llama_cpp.llama_decode(self._context, self._batch.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _best(self, index: int) -> int:
        """The likeliest token after the batch's token `index`."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(floats, (self._config.vocab_size,))
        return int(np.argmax(logits))


def load(
    name: str, folder: pathlib.Path, config: ModelConfig, threads: int
) -> LlamaCpp:
    """`llama_cpp_KIND`, from a GGUF file that is made beside the folder."""
    kind = name.removeprefix("llama_cpp_")
    path = gguf_file.file(folder, config, kind, threads)
    return LlamaCpp(path, config, threads)
