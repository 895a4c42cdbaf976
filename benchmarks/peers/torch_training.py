"""The process of the training peer: transformers' Llama on PyTorch, JSON lines.

    python -m benchmarks.peers.torch_training FOLDER SETTINGS.json THREADS

A request has "tokens", a learning "rate" and perhaps "segment_ids"; the reply the
"loss" before the update, its "seconds" and the process's "peak_bytes". The optimiser is
that of `cli.train`: AdamW, matrices alone decay, behind a global-norm clip.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from transformers.integrations.sdpa_attention import (  # pyright: ignore
    sdpa_attention_forward,
)

# transformers makes no mask for an attention that it has no masks for: "sdpa" is then
# told that it is causal, and skips what a query does not see.
_ATTENTION = "sdpa_causal"
transformers.AttentionInterface.register(_ATTENTION, sdpa_attention_forward)


class Trainer:
    """float32, attention "sdpa", the loss and its gradients compiled."""

    def __init__(self, folder: str, settings: dict[str, Any], *, compiled: bool):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_ATTENTION
        )
        model.config.use_cache = False
        self._model = model.train()
        self._loss: Any = torch.compile(self._mean) if compiled else self._mean
        parameters = [*model.parameters()]
        decay = settings["weight_decay"]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(settings["beta1"], settings["beta2"]),
            eps=1e-8,
            weight_decay=decay,
            fused=True,
        )
        self._parameters, self._clip = parameters, settings["clip_norm"]

    def step(self, tokens: Any, segment_ids: np.ndarray | None, rate: float) -> float:
        """One update; returns the mean loss before it."""
        ids = torch.from_numpy(tokens).long()
        counted = torch.ones(ids.shape)
        given: dict[str, Any] = {}
        if segment_ids is not None:
            segments = torch.from_numpy(segment_ids).long()
            same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
            counted[:, :-1] = same.float()
            given = _packed(segments)
        counted[:, -1] = 0.0  # nothing follows
        loss = self._loss(ids, ids.roll(-1, dims=1), counted, **given)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return loss.item()

    def _mean(
        self, ids: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, **given
    ) -> torch.Tensor:
        logits = self._model(input_ids=ids, **given).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return (losses * counted.flatten()).sum() / counted.sum()


def _packed(segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """A mask `[B, 1, T, T]` and each token's place in its document."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    mask = same & torch.ones(length, length).tril().bool()
    edges = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    places = torch.arange(length).expand_as(segments)
    first = torch.where(edges, places, 0).cummax(dim=1).values
    return {"attention_mask": mask[:, None], "position_ids": places - first}


def _replies(folder: str, settings: str, threads: str) -> Iterator[dict[str, Any]]:
    try:
        torch.set_num_threads(int(threads))
        values = json.loads(settings)
        trainer = Trainer(folder, values, compiled=values.get("compiled", True))
        packages = {"torch": torch, "transformers": transformers}
        yield {"versions": {name: m.__version__ for name, m in packages.items()}}
        for line in sys.stdin:
            request = json.loads(line)
            tokens, segment_ids = (
                None if request.get(name) is None else np.asarray(request[name])
                for name in ("tokens", "segment_ids")
            )
            start = time.perf_counter()
            loss = trainer.step(tokens, segment_ids, request["rate"])
            seconds = time.perf_counter() - start
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            yield {"loss": loss, "seconds": seconds, "peak_bytes": peak}
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        yield {"error": f"{type(error).__name__}: {text}"}


def main() -> None:
    """Says that it is ready, with the versions, and serves until its input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for reply in _replies(*sys.argv[1:]):
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
