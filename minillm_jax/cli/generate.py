"""Text from a prompt, streamed to the terminal, or a chat.

    python -m minillm_jax.cli.generate --config=small --prompt="Once upon a time"
    python -m minillm_jax.cli.generate --config=configs/custom.py --chat

Every field of SamplingParams is a flag of the same name. The text goes to stdout,
rates to stderr; with --json one object goes to stdout instead. Ctrl-C ends with what
there is so far, and exit code 130.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from minillm_jax.cli import app, chat, config_files, reply
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import requests
from minillm_jax.decoding.generator import Generator
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.planning import devices, memory
from minillm_jax.text import tokenizer as tokenizers

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines everything but --config."""
    flags.DEFINE_string("prompt", None, "The prompt; else --prompt_file, else stdin.")
    flags.DEFINE_string("prompt_file", None, "A UTF-8 file with the prompt.")
    flags.DEFINE_string(
        "tokenizer", None, "A tokenizer.json or its folder; else bytes."
    )
    flags.DEFINE_bool("chat", False, "Talk: a line is a message, its answer follows.")
    flags.DEFINE_string("system", None, "The system message of a chat.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the text.")
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to generate at most.")
    policies = ["error", "stop", "ring"]
    flags.DEFINE_enum(
        "overflow", "stop", policies, "What to do when the cache is full."
    )
    flags.DEFINE_integer("num_sinks", 0, "First tokens that a ring keeps.")
    special = {
        "logit_bias": (flags.DEFINE_list, "Added to logits, as ID:NUMBER,ID:NUMBER."),
        "stop": (flags.DEFINE_multi_string, "Ends the text; can be repeated."),
        "stop_token_ids": (flags.DEFINE_list, "Ids that end the text, as ID,ID."),
        "logprobs": (flags.DEFINE_integer, "With --json: report so many likeliest."),
    }
    for field in dataclasses.fields(SamplingParams):
        define, text = special.get(field.name, (None, "See SamplingParams."))
        default: Any = None
        if define is None:
            default = field.default
            whole = isinstance(default, int)
            define = flags.DEFINE_integer if whole else flags.DEFINE_float
        define(field.name, default, text)


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
            return pathlib.Path(source).read_bytes().decode()
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError(
                "there is no prompt: give --prompt, --prompt_file, or stdin"
            )
        return sys.stdin.buffer.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        name = "stdin" if source is None else f"--prompt_file={source}"
        reason = getattr(error, "strerror", None) or f"is not UTF-8: {error}"
        raise UserError(f"{name}: {reason}") from None


def check(
    config: ModelConfig, tokenizer: Any, prompt: list[int], params: SamplingParams
) -> None:
    """Raises what is wrong with the request before the weights are there.

    UserError if weights and cache do not fit.
    """
    policy = kv.CachePolicy(overflow=FLAGS.overflow, num_sinks=FLAGS.num_sinks)
    request, *_ = requests.make_requests(
        config,
        tokenizer,
        policy,
        [prompt],
        max_new_tokens=FLAGS.max_new_tokens,
        sampling=params,
    )
    tokens = len(prompt) + request.budget
    device = jax.devices()[0]
    plan = memory.plan_decode(
        config,
        batch_size=1,
        capacity=kv.capacity_bucket(config, min(tokens, config.max_kv_cache_len)),
        platform=device.platform,
        limit_bytes=devices.available_bytes(device),
        policy=policy,
    )
    if not plan.fits:
        raise UserError(plan.refusal(devices.device_name(device)))


def main(config: Any) -> None:
    """Generates, or chats."""
    params = sampling_params()
    tokenizer: Any = tokenizers.ByteTokenizer()
    if FLAGS.tokenizer is not None:
        tokenizer = tokenizers.load_tokenizer(FLAGS.tokenizer)
    model_config = config_files.model_config(config)
    if not model_config.eos_token_ids:
        model_config = model_config.replace(eos_token_ids=tokenizer.eos_token_ids)
    if FLAGS.chat and (FLAGS.json or FLAGS.prompt or FLAGS.prompt_file):
        raise UserError("--chat reads its messages from stdin, and prints no JSON")
    prompt = None if FLAGS.chat else tokenizer.encode(read_prompt())
    check(model_config, tokenizer, [0] if prompt is None else prompt, params)

    model = transformer.create_model(model_config)
    with reply.status("making random weights"):
        weights = jax.block_until_ready(transformer.init_params(model))
    generator = Generator(
        model, weights, tokenizer, overflow=FLAGS.overflow, num_sinks=FLAGS.num_sinks
    )
    if prompt is None:
        chat.run(generator, FLAGS.system, FLAGS.max_new_tokens, params)
        return
    answer = reply.Reply(generator, prompt, FLAGS.max_new_tokens, params)
    answer.show(quiet=FLAGS.json)
    if FLAGS.json:
        print(json.dumps(answer.report()), flush=True)
    else:
        print(answer.summary(), file=sys.stderr)
    if answer.interrupted:
        sys.exit(130)


if __name__ == "__main__":
    define_flags()
    app.run(main)
