"""Flags that say what to generate: a prompt, and every field of SamplingParams."""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from minillm_jax.cli.app import UserError
from minillm_jax.decoding.sampling import SamplingParams

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines them; their values are read by the functions below."""
    flags.DEFINE_string("prompt", None, "The prompt; else --prompt_file, else stdin.")
    flags.DEFINE_string("prompt_file", None, "A UTF-8 file with the prompt.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to generate at most.")
    number, whole = flags.DEFINE_float, flags.DEFINE_integer
    number("temperature", 1.0, "Divides the logits; 0 = greedy.")
    whole("top_k", 0, "Keep the k likeliest tokens; 0 = off.")
    number("top_p", 1.0, "Keep the likeliest that together have this probability.")
    number("min_p", 0.0, "Keep those with this share of the likeliest's probability.")
    number("repetition_penalty", 1.0, "Above 1, against what has been said before.")
    number("frequency_penalty", 0.0, "Subtracted for each time a token was generated.")
    number("presence_penalty", 0.0, "Subtracted once a token was generated.")
    flags.DEFINE_list("logit_bias", None, "Added to logits, as ID:NUMBER,ID:NUMBER.")
    whole("seed", 0, "The same seed, prompt and machine give the same tokens.")
    flags.DEFINE_multi_string("stop", None, "Ends the text; can be repeated.")
    flags.DEFINE_list("stop_token_ids", None, "Ids that end the text, as ID,ID.")
    whole("logprobs", None, "With --json: log-probabilities, of so many likeliest too.")


def sampling_params() -> SamplingParams:
    """The flags named like its fields; raises UserError or ConfigError."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    given: dict[str, Any] = {name: FLAGS[name].value for name in names}
    try:
        if given["stop_token_ids"]:
            given["stop_token_ids"] = [int(i) for i in given["stop_token_ids"]]
        if given["logit_bias"]:
            pairs = [item.split(":") for item in given["logit_bias"]]
            given["logit_bias"] = {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise UserError(
            "--stop_token_ids are whole numbers with commas between them, and "
            "--logit_bias is ID:NUMBER,ID:NUMBER"
        ) from None
    return SamplingParams(**given)


def read_prompt() -> str:
    """The prompt, wherever it comes from; raises UserError."""
    if FLAGS.prompt is not None and FLAGS.prompt_file is not None:
        raise UserError("--prompt and --prompt_file are both given; give one")
    if FLAGS.prompt is not None:
        return FLAGS.prompt
    source = FLAGS.prompt_file
    try:
        if source is not None:
            return pathlib.Path(source).read_bytes().decode("utf-8-sig")
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(
                "there is no prompt: give --prompt, --prompt_file, or stdin"
            )
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        name = "stdin" if source is None else f"--prompt_file={source}"
        reason = getattr(error, "strerror", None) or f"is not UTF-8: {error}"
        raise UserError(f"{name}: {reason}") from None
