"""A folder beside the model that is said to be in it: bits, logits, tokens."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from minillm_jax.decoding import generator
from minillm_jax.decoding.sampling import GREEDY
from minillm_jax.model import rope, transformer
from minillm_jax.model.transformer import MiniLLM
from minillm_jax.weights import load

TOLERANCE = 1e-4  # of float32 logits, times the largest where that is above 1
LENGTHS = (
    16,
    256,
    2048,
)  # tokens of the sequences that are compared, as far as they fit
NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison; `passed` None where it could not be made."""

    text: str
    passed: bool | None

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "skipped"}
        return f"{words[self.passed]:8}{self.text}"


def lines(
    model: MiniLLM, params: dict[str, Any], folder: str | pathlib.Path
) -> Iterator[Line]:
    """Compares, a line each."""
    folder = pathlib.Path(folder)
    back = load.read_params(folder, model.config, load.read_family(folder))
    same = jax.tree.map(lambda a, b: np.array_equal(_bits(a), _bits(b)), params, back)
    bits = all(jax.tree.leaves(same))
    yield Line("read again: every parameter is the same, bit for bit", bits)
    del back
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        yield Line(f"transformers' logits and tokens: {error}", None)
        return
    try:
        yield from _beside(transformers, torch, model, params, folder)
    except Exception as error:  # whatever transformers finds wrong with the folder
        reason = " ".join(str(error).split())[:200]
        yield Line(f"transformers: {type(error).__name__}: {reason}", False)


def _beside(
    transformers: Any,
    torch: Any,
    model: MiniLLM,
    params: dict[str, Any],
    folder: pathlib.Path,
) -> Iterator[Line]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    theirs.generation_config.eos_token_id = None  # neither ends before the other
    ours, params = transformer.in_float32(model, params, eos_token_ids=())
    config = ours.config
    draw = np.random.default_rng(0)
    for length in sorted({min(length, config.max_seq_len) for length in LENGTHS}):
        tokens = draw.integers(0, config.vocab_size, (1, length), np.int32)
        yield _logits(ours, params, theirs, tokens)
    yield _greedy(ours, params, theirs)


def _bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(f"V{x.dtype.itemsize}")


def _logits(ours: MiniLLM, params: Any, theirs: Any, tokens: np.ndarray) -> Line:
    import torch  # pyright: ignore[reportMissingImports]

    mine = np.asarray(jax.jit(ours.apply)({"params": params}, tokens))
    with torch.no_grad():
        other = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    difference, largest = np.abs(mine - other).max(), np.abs(other).max()
    text = (
        f"transformers' logits of {tokens.shape[1]} tokens, float32: "
        f"max |d| {difference:.1e}, largest {largest:.1f}"
    )
    return Line(text, bool(difference <= TOLERANCE * max(1.0, largest)))


def _greedy(ours: MiniLLM, params: Any, theirs: Any) -> Line:
    import torch  # pyright: ignore[reportMissingImports]

    prompt = np.arange(1, 9) % ours.config.vocab_size
    new = max(1, min(NEW_TOKENS, ours.config.max_kv_cache_len - len(prompt)))
    made = generator.Generator(ours, params)
    (mine,) = made.generate([prompt.tolist()], max_new_tokens=new, sampling=GREEDY)
    ids = torch.tensor(prompt[None], dtype=torch.long)
    with torch.no_grad():
        other = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            # Beyond longrope's original context theirs keeps keys of the shorter one.
            use_cache=rope.turning_point(ours.config) is None,
        )
    other = other[0, len(prompt) :].tolist()
    same = sum(a == b for a, b in zip(mine.tokens, other, strict=False))
    text = f"transformers' greedy tokens: {same} of {new} the same"
    return Line(text, same == new)
