"""transformers on PyTorch, float32: its growing cache, or a static one and a compiler.

Attention is "sdpa" in both; of a prompt, only the last token's logits are made.
"""

import pathlib
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from minillm_jax.config import ModelConfig
from minillm_jax.planning import costs


class Eager:
    """`DynamicCache`, whose tensors grow by a copy at every step."""

    def __init__(self, model: Any, config: ModelConfig):
        self._model, self._config = model, config
        self._step: Any = model
        self._cache: Any = None
        self._first = torch.zeros((0,), dtype=torch.long)
        self._prompt_tokens = 0

    def begin(self, batch_size: int, context: int) -> None:
        self._cache = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            self._empty()
            prompt = torch.from_numpy(tokens).long()
            self._first = self._next(self._model, prompt)
            self._prompt_tokens = tokens.shape[1]
            return self._first.numpy()

    def decode(self, steps: int) -> np.ndarray:
        with torch.inference_mode():
            self._rewind()
            token, out = self._first, []
            for _ in range(steps):
                token = self._next(self._step, token[:, None])
                out.append(token)
            return torch.stack(out, dim=1).numpy()

    def step_bytes(self, batch_size: int, held: int) -> int:
        return costs.decode_step_bytes(self._config, batch_size, held)

    def _next(self, forward: Any, tokens: torch.Tensor) -> torch.Tensor:
        out = forward(
            input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(dim=-1)

    def _empty(self) -> None:
        self._cache = transformers.DynamicCache(config=self._model.config)

    def _rewind(self) -> None:
        assert self._cache is not None
        added = self._cache.get_seq_length() - self._prompt_tokens
        if added > 0:  # crop(-n) takes the last n tokens away
            self._cache.crop(-added)


class Compiled(Eager):
    """`StaticCache`, and a decode step that `torch.compile` has made."""

    def __init__(self, model: Any, config: ModelConfig):
        super().__init__(model, config)
        self._step = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def begin(self, batch_size: int, context: int) -> None:
        torch._dynamo.reset()  # it compiles no more than a few shapes
        self._cache = transformers.StaticCache(
            config=self._model.config, max_cache_len=context
        )

    def _empty(self) -> None:
        self._fill(0)

    def _rewind(self) -> None:
        self._fill(self._prompt_tokens)

    def _fill(self, length: int) -> None:
        """Makes `length` the tokens held; later slots are masked, then overwritten."""
        assert self._cache is not None
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)


def load(name: str, folder: pathlib.Path, config: ModelConfig, threads: int) -> Eager:
    """`transformers_eager` or `transformers_compiled`."""
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    kind = Compiled if name == "transformers_compiled" else Eager
    wide = config.replace(param_dtype="float32", cache_dtype="float32")
    return kind(model.eval(), wide)
