"""Text from a prompt, streamed to the terminal, or a chat.

    python -m minillm_jax.cli.generate --prompt="def "
    python -m minillm_jax.cli.generate --config=small --prompt="Once upon a time"
    python -m minillm_jax.cli.generate --model=FOLDER --chat
    python -m minillm_jax.cli.generate --prompt_file=long.txt --prompt_cache=long.cache
    python -m minillm_jax.cli.generate --workdir=runs/a --prompt="def "

Where nothing names a model it is the small one of Python source that comes with the
package. Every field of SamplingParams is a flag of the same name. The text goes to
stdout, rates to stderr; with --json one object goes to stdout instead. Ctrl-C ends with
what there is so far, and exit code 130.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from minillm_jax.cli import app, chat, config_files, model_folder, reply, request
from minillm_jax.cli.app import UserError
from minillm_jax.config import ModelConfig
from minillm_jax.decoding import generator, prompt_cache, requests
from minillm_jax.decoding.sampling import SamplingParams
from minillm_jax.model import cache as kv
from minillm_jax.model import transformer
from minillm_jax.planning import advice, memory
from minillm_jax.planning.memory import MemoryPlan
from minillm_jax.planning.workload import Workload
from minillm_jax.text import tokenizer as tokenizers
from minillm_jax.training import run_folder
from minillm_jax.training.errors import DataError
from minillm_jax.weights import hub, load

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines everything but --config."""
    request.define_flags()
    flags.DEFINE_string(
        *("tokenizer", None),
        "A tokenizer.json or its folder; else that of --model, or bytes.",
    )
    flags.DEFINE_string("workdir", None, "A training run, whose best model is taken.")
    flags.DEFINE_string(
        *("prompt_cache", None),
        "Keep the prompt's cache in this file, and prefill only what is not in it.",
    )
    flags.DEFINE_integer(
        *("prompt_cache_bytes", prompt_cache.BUDGET_BYTES),
        "Of the caches in it at most; those used last stay.",
        lower_bound=0,
    )
    flags.DEFINE_bool("chat", False, "Talk: a line is a message, its answer follows.")
    flags.DEFINE_string("system", None, "The system message of a chat.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of the text.")
    policies = ["error", "stop", "ring"]
    flags.DEFINE_enum(
        "overflow", "stop", policies, "What to do when the cache is full."
    )
    flags.DEFINE_integer("num_sinks", 0, "First tokens that a ring keeps.")


def check(
    config: ModelConfig,
    tokenizer: Any,
    prompt: list[int],
    sampling: SamplingParams,
    *,
    trained: bool,
) -> None:
    """Raises what is wrong with the request before the weights are there.

    UserError if weights and cache do not fit, with what would; weights that are
    `trained` keep their shapes.
    """
    policy = kv.CachePolicy(overflow=FLAGS.overflow, num_sinks=FLAGS.num_sinks)
    longest = config.max_kv_cache_len
    asked, *_ = requests.make_requests(
        config,
        tokenizer,
        policy,
        [prompt],
        max_new_tokens=FLAGS.max_new_tokens,
        sampling=sampling,
    )
    rows = 1 if FLAGS.prompt_cache is None else 2  # the prompt's cache is kept beside
    tokens = min(len(prompt) + asked.budget, longest)
    plan = planned(config, policy, tokens, rows)
    if not plan.fits:
        # Of a stopped row one token is enough, of a ring whatever it sees.
        least = {"stop": min(len(prompt) + 1, longest), "error": plan.context}
        shortest = least.get(policy.overflow)
        raise UserError(refusal(config, plan, shortest, trained=trained))


def refusal(
    config: ModelConfig, plan: MemoryPlan, least_context: int | None, *, trained: bool
) -> str:
    """Why a plan does not fit, with fields of the config that would."""
    least = {"least_context": least_context}
    fitting = advice.until_it_fits(
        plan, advice.singles(plan, trained=trained, **least), **least
    )
    if fitting is None:
        return f"{plan.refusal()}; nothing smaller fits either"
    words = fitting.change.settings(config, fitting.plan.config)
    size = memory.gigabytes(fitting.plan.total_bytes)
    return f"{plan.refusal()}; this fits, with {size}: {words}"


def planned(
    config: ModelConfig, policy: kv.CachePolicy, tokens: int, rows: int = 1
) -> MemoryPlan:
    """The plan of rows of so many tokens, in a cache as the Generator allocates it."""
    device = memory.find_device("this")
    config = config.resolve(device.platform)
    work = Workload(config=config, batch_size=rows, context=tokens, policy=policy)
    return memory.plan(work, device)


def _tokenizer(folder: pathlib.Path | None) -> chat.ChatTokenizer:
    if FLAGS.tokenizer is not None:
        return tokenizers.load_tokenizer(FLAGS.tokenizer)
    if folder is not None:
        if (found := load.read_tokenizer(folder)) is not None:
            return found
        print(f"generate: {folder} has no tokenizer.json: bytes", file=sys.stderr)
    return tokenizers.ByteTokenizer()


def main(config: Any) -> None:
    """Generates, or chats."""
    if FLAGS.prompt_cache is not None:
        app.check_writable(FLAGS.prompt_cache, "--prompt_cache")
    sampling = request.sampling_params()
    tokenizer = _tokenizer(model_folder.folder(config))
    model_config = config_files.model_config(config)
    if not model_config.eos_token_ids:
        if (largest := max(tokenizer.known_ids)) >= model_config.vocab_size:
            raise UserError(
                f"--tokenizer has ids up to {largest}, but the model's are below "
                f"vocab_size={model_config.vocab_size}; set --config.model.vocab_size"
            )
        model_config = model_config.replace(eos_token_ids=tokenizer.eos_token_ids)
    if not FLAGS.chat:
        if FLAGS.system is not None:
            raise UserError("--system is for --chat")
        prompt = tokenizer.encode(request.read_prompt())
    elif FLAGS.json or FLAGS.prompt is not None or FLAGS.prompt_file is not None:
        raise UserError("--chat reads its messages from stdin, and prints no JSON")
    else:  # as short as one can be
        prompt = tokenizer.encode_chat([*chat.beginning(FLAGS.system), chat.user("Hi")])
    trained = model_folder.folder(config) is not None
    check(model_config, tokenizer, prompt, sampling, trained=trained)

    model = transformer.create_model(model_config)
    params = model_folder.params(config, model)
    made = generator.Generator(
        *(model, params, tokenizer, FLAGS.overflow, FLAGS.num_sinks),
        prompt_cache_bytes=FLAGS.prompt_cache_bytes,
    )
    if FLAGS.prompt_cache is not None:
        _use_prompt_cache(made, prompt)
    if FLAGS.chat:
        chat.run(made, tokenizer, FLAGS.system, FLAGS.max_new_tokens, sampling)
        return
    answer = reply.Reply(made, prompt, FLAGS.max_new_tokens, sampling)
    answer.show(quiet=FLAGS.json)
    if FLAGS.json:
        print(json.dumps(answer.report()), flush=True)
    else:
        print(answer.summary(), file=sys.stderr)
    if answer.interrupted:
        raise KeyboardInterrupt


def _use_prompt_cache(made: generator.Generator, prompt: list[int]) -> None:
    """Loads the file, if there is one, and adds the prompt where it is not in it."""
    path = pathlib.Path(FLAGS.prompt_cache)
    if path.exists():
        made.load_cache(path)
    if made.remember(prompt):
        made.save_cache(path)


def trained() -> str | None:
    """The model of --workdir; raises UserError where there is none yet."""
    if FLAGS.workdir is None:
        return None
    try:
        return str(run_folder.trained_model(FLAGS.workdir))
    except DataError as error:
        raise UserError(f"--workdir={error}") from None


if __name__ == "__main__":
    define_flags()
    app.run(main, named=trained, unnamed=str(hub.SHIPPED))
