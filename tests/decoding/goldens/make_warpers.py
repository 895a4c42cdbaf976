"""Writes warpers.json: what transformers' own processors make of some logits.

    python tests/decoding/goldens/make_warpers.py

Needs the `parity` extra (torch and transformers), which the tests themselves do not.
Numbers only: rows of logits with few decimals, settings, and the tokens kept with their
probabilities, if above 1e-30. The processors and their order are those of `generate`.
Left out are settings where rounding or an unstable sort would decide, not the rule: a
top_p or min_p within 1e-5 of a boundary, and ties across the edge of top_p.
"""

import itertools
import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.generation import utils

PATH = pathlib.Path(__file__).with_name("warpers.json")
MARGIN = 1e-5
UNDERFLOW = 1e-30  # probabilities from here on are as good as 0
PROMPT, COMPLETION = [3, 7, 7, 21, 40], [5, 21, 5, 12]
BIAS = {0: 2.5, 3: -1.5, 7: 4.0, 12: -100.0, 33: float("-inf"), 49: 0.75}
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 17},
    {"top_k": 1000},
    {"top_p": 1e-6},
    {"top_p": 0.31},
    {"top_p": 0.9},
    {"top_p": 0.9995},
    {"min_p": 0.003},
    {"min_p": 0.21},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 9, "min_p": 0.05},
    {"top_p": 0.97, "min_p": 0.01},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.02},
]
OTHERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 0.85, "repetition_penalty": 1.3},
    {"temperature": 7.5, "logit_bias": BIAS},
    {"repetition_penalty": 0.6, "logit_bias": BIAS},
]


class _Decoder(utils.GenerationMixin):
    """As much of a model as the choice of processors looks at."""

    config = transformers.PretrainedConfig()


def rows() -> dict[str, list[float]]:
    """Logits of 50 to 200 tokens: plain, tied, negative, flat, of a large spread."""
    generator = np.random.default_rng(20)
    near = generator.normal(0.0, 1.5, 50)
    wide = generator.normal(0.0, 3.0, 200)
    values = {
        "near 50": near.round(3),
        "tied 50": (near * 2).round() / 2,
        "negative 50": (near - 9.0).round(3),
        "spread 50": (near * 40).round(2),
        "wide 200": wide.round(3),
        "flat 130": (wide[:130] / 100).round(4),
        "tied 150": (wide[:150] / 2).round(),
        "peaked 200": (wide + 14.0 * (np.arange(200) == 77)).round(3),
    }
    return {name: (row + 0.0).tolist() for name, row in values.items()}


def processors(settings: dict) -> list:
    """What `generate` would apply, in its order."""
    given = dict(settings)
    bias = given.pop("logit_bias", None)
    given.setdefault("top_k", 0)
    if bias is not None:
        given["sequence_bias"] = {(token,): value for token, value in bias.items()}
    config = transformers.GenerationConfig(do_sample=True, **given)
    return _Decoder()._get_logits_processor(
        config, input_ids_seq_length=len(PROMPT), device="cpu", model_kwargs={}
    )


def scores(logits: list[float], settings: dict) -> torch.Tensor:
    """Processed logits; those of the tokens that are not kept are -inf."""
    ids = torch.tensor([PROMPT + COMPLETION])
    return processors(settings)(ids, torch.tensor([logits], dtype=torch.float32))[0]


def is_decided_by_rounding(logits: list[float], settings: dict) -> bool:
    """Whether a boundary is so near that float32, or the sort, decides."""
    found = False
    if (min_p := settings.get("min_p")) and min_p < 1.0:
        rest = {k: v for k, v in settings.items() if k != "min_p"}
        probs = scores(logits, rest).double().softmax(-1)
        found |= bool(((probs / probs.max() - min_p).abs() < MARGIN).any())
    if top_p := settings.get("top_p"):
        rest = {k: v for k, v in settings.items() if k not in ("top_p", "min_p")}
        probs = scores(logits, rest).double().softmax(-1)
        above = torch.stack([probs[probs > p].sum() for p in probs])
        up_to = torch.stack([probs[probs >= p].sum() for p in probs])
        found |= bool(((above - top_p).abs() < MARGIN).any())
        # Tokens of one probability, of which a sort would keep some.
        size = torch.stack([(probs == p).sum() for p in probs])
        cut = (size > 1) & (probs > 0) & (above < top_p) & (up_to > top_p)
        found |= bool(cut.any())
    return found


def case(name: str, logits: list[float], settings: dict) -> dict:
    """A row, its settings, and the probabilities of the tokens kept."""
    probs = scores(logits, settings).softmax(-1)
    kept = torch.nonzero(probs > UNDERFLOW)[:, 0].tolist()
    return {
        "row": name,
        "settings": {
            k: v if k != "logit_bias" else "bias" for k, v in settings.items()
        },
        "kept": "all" if len(kept) == len(logits) else kept,
        "probabilities": [float(f"{p:.6g}") for p in probs[kept].tolist()],
    }


def main() -> None:
    """Writes the file; prints how many cases it holds and how many were left out."""
    cases, left_out = [], 0
    for (name, logits), filters, others in itertools.product(
        rows().items(), FILTERS, OTHERS
    ):
        settings = others | filters
        if is_decided_by_rounding(logits, settings):
            left_out += 1
        else:
            cases.append(case(name, logits, settings))
    goldens = {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompt": PROMPT,
        "completion": COMPLETION,
        # Text: JSON has no -inf, and no whole numbers as keys.
        "bias": {str(token): str(value) for token, value in BIAS.items()},
        "rows": rows(),
    }
    lines = ",\n".join(json.dumps(item, separators=(",", ":")) for item in cases)
    head = json.dumps(goldens)[:-1]
    PATH.write_text(f'{head},\n"cases": [\n{lines}\n]}}\n', encoding="ascii")
    print(f"{len(cases)} cases, {left_out} left out, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
