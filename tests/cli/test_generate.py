"""`cli.generate` as a person uses it: text, JSON, pipes, mistakes, Ctrl-C, a chat."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
from absl import flags
from tokenizers import decoders, models, pre_tokenizers

import minillm_jax as mj
from minillm_jax.cli import generate, request
from minillm_jax.planning import devices
from tests import commands

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "max_seq_len": 64,
    "max_kv_cache_len": 300,
    "dim_model": 32,
    "num_heads": 2,
    "num_layers": 1,
    "dim_ff": 64,
    "vocab_size": 300,
    "prefill_chunk": 32,
}
ARGUMENTS = [
    *("minillm_jax.cli.generate", "--config=small"),
    *(f"--config.model.{name}={value}" for name, value in TINY.items()),
]
COMMAND = [sys.executable, "-m", *ARGUMENTS]  # in a process of its own
GREEDY = ("--prompt=Once", "--temperature=0")
LONG = "x" * 290
FULL = (f"--prompt={LONG}", "--json", "--temperature=0")


def run(*arguments, given=""):
    return commands.run(*ARGUMENTS, *arguments, given=given)


# Name -> arguments of runs that go well.
RUNS = {
    "text": (*GREEDY, "--max_new_tokens=20"),
    "json": (*GREEDY, "--max_new_tokens=20", "--json", "--logprobs=2"),
    "file": ("--prompt_file=TMP/prompt.txt", "--temperature=0", "--json"),
    "stdin": ("--temperature=0", "--json", "--max_new_tokens=5"),
    "cache full": (*FULL, "--max_new_tokens=11"),
    "tie": (*FULL, "--max_new_tokens=10"),
    "one fewer": (*FULL, "--max_new_tokens=9"),
    "error fits": (*FULL, "--max_new_tokens=10", "--overflow=error"),
    "exactly full": (f"--prompt={LONG + 10 * 'y'}", "--json", "--temperature=0"),
    "ring": (
        *(f"--prompt={LONG + LONG}", "--json", "--temperature=0"),
        *("--max_new_tokens=40", "--overflow=ring", "--num_sinks=4"),
    ),
    "sampling": (
        *("--prompt=a", "--json", "--seed=3", "--temperature=0.7", "--top_k=20"),
        *("--top_p=0.9", "--min_p=0.01", "--repetition_penalty=1.1"),
        *("--frequency_penalty=0.1", "--presence_penalty=-0.1"),
        *("--logit_bias=65:-100,66:2.5", "--max_new_tokens=8"),
    ),
    "stop id": ("--prompt=a", "--json", "--logit_bias=90:100", "--stop_token_ids=90"),
    "stop": ("--prompt=a", "--json", "--logit_bias=90:100", "--stop=Q", "--stop=ZZZ"),
    "tokenizer": ("--prompt=ab", "--json", "--tokenizer=TMP", "--max_new_tokens=50"),
}
# Arguments -> words that the line must hold.
MISTAKES = {
    ("--prompt=",): ("prompt 0 is empty", "at least one token"),
    ("--prompt=a", "--prompt_file=b"): ("--prompt and --prompt_file",),
    ("--prompt_file=/nowhere",): ("/nowhere", "No such file"),
    ("--prompt_file=TMP/latin.txt",): ("latin.txt", "not UTF-8"),
    ("--prompt=a", "--temperature=nan"): ("temperature=nan", "[0, "),
    ("--prompt=a", "--temperature=warm"): ("temperature=warm",),
    ("--prompt=a", "--top_p=2", "--min_p=-1"): ("top_p=2", "min_p=-1"),
    ("--prompt=a", "--top_k=-3"): ("top_k=-3", "write 0"),
    ("--prompt=a", "--stop="): ("stop", "non-empty"),
    ("--prompt=a", "--stop_token_ids=x"): ("--stop_token_ids", "whole numbers"),
    ("--prompt=a", "--stop_token_ids=300"): ("stop_token_ids", "300", "299"),
    ("--prompt=a", "--logit_bias=3"): ("--logit_bias", "ID:NUMBER"),
    ("--prompt=a", "--logprobs=21"): ("logprobs=21", "write 20"),
    ("--prompt=a", "--temprature=1"): ("temprature", "temperature"),
    ("--prompt=a", "--max_new_tokens=0"): ("max_new_tokens=0", "write 1"),
    ("--prompt=a", "--overflow=wrap"): ("overflow=wrap", "error|stop|ring"),
    ("--prompt=a", "--num_sinks=2"): ("num_sinks=2", "overflow='ring'"),
    (f"--prompt={LONG + 11 * 'y'}",): ("301 tokens", "300", "shorten it by 1"),
    (f"--prompt={LONG}", "--overflow=error", "--max_new_tokens=11"): (
        *("290 tokens", "max_new_tokens=11", "300", "max_new_tokens=10 would fit"),
    ),
    ("--prompt=a", "--tokenizer=/nowhere"): ("/nowhere", "tokenizer.json"),
    ("--prompt=a", "--chat"): ("--chat",),
    ("--chat", "--json"): ("--chat", "JSON"),
    ("--prompt=a", "--config.model.num_layers=999", "--config.model.dim_ff=2000000"): (
        *("does not fit", "GB"),
    ),
    ("--prompt=a", "--prompt_cache=TMP"): ("--prompt_cache", "must be a file"),
    ("--prompt=a", "--prompt_cache=/nowhere/x"): ("/nowhere/x", "must be a file"),
    ("--prompt=a", "--prompt_cache=TMP/prompt.txt"): ("prompt.txt", "cannot be read"),
    ("--prompt=a", "--prompt_cache=TMP/x", "--prompt_cache_bytes=9"): (
        *("prompt_cache_bytes=9", "write "),
    ),
    ("stray", "--prompt=a"): ("stray arguments",),
    ("--chat", "--tokenizer=TMP"): ("no chat template",),
    (): ("prompt 0 is empty", "at least one token"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prompt, a file in Latin-1, and a tokenizer of ten letters with an EOS."""
    path = tmp_path_factory.mktemp("prompts")
    (path / "prompt.txt").write_text("Once")
    (path / "latin.txt").write_bytes("é".encode("latin-1"))
    letters = {letter: i for i, letter in enumerate("abcdefghij")}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return path


@pytest.fixture(scope="module")
def outcome(folder):
    """That of a run by its name, or of other arguments; each runs once."""

    @functools.cache
    def one(asked):
        given = "Once" if asked == "stdin" else ""
        arguments = RUNS.get(asked, asked)
        filled = (argument.replace("TMP", str(folder)) for argument in arguments)
        return run(*filled, given=given)

    return one


def report(done):
    """The JSON of a run that went well: one object, last on stdout."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda a: " ".join(a)[:50])
def test_a_mistake_is_one_clear_line(outcome, arguments):
    done = outcome(arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, lines
    assert len(lines) == 1
    assert lines[0].startswith("generate: error: ")
    for word in MISTAKES[arguments]:
        assert word in lines[0]
    assert not done.stdout


def test_text_goes_to_stdout_and_rates_to_stderr(outcome):
    done, told = outcome("text"), report(outcome("json"))
    assert done.returncode == 0
    assert done.stdout == told["text"] + "\n"
    note, summary = done.stderr.splitlines()
    assert note.startswith("generate: the weights are random")
    assert "20 tokens at" in summary
    assert "ended by length; cache 24 of 300" in summary


def test_a_process_of_its_own_ends_well(outcome):
    ran = subprocess.run([*COMMAND, *RUNS["text"]], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0
    assert ran.stdout.decode() == outcome("text").stdout
    assert len(ran.stderr.splitlines()) == 2  # the note, and the summary


def test_the_json_tells_what_the_run_cost(outcome):
    told = report(outcome("json"))
    assert (told["prompt_tokens"], told["completion_tokens"]) == (4, 20)
    assert len(told["tokens"]) == len(told["logprobs"]) == 20
    assert [len(top) for top in told["top_logprobs"]] == [2] * 20
    assert told["cache"]["tokens"] == 24
    assert told["cache"]["capacity"] == 300
    assert told["cache"]["overwritten"] == 0
    assert told["decode_tokens_per_second"] > 0
    assert told["ttft_seconds"] > 0
    assert told["compile_seconds"] > 0
    assert told["config"]["dim_model"] == 32


def test_the_prompt_may_come_from_a_file_or_a_pipe(outcome):
    tokens = report(outcome("json"))["tokens"]
    assert report(outcome("file"))["tokens"][:20] == tokens
    assert report(outcome("stdin"))["tokens"] == tokens[:5]


@pytest.mark.parametrize(
    ("name", "tokens", "reason"),
    [
        ("one fewer", 9, "length"),
        ("tie", 10, "length"),
        ("cache full", 10, "cache_full"),
        ("error fits", 10, "length"),
        ("exactly full", 0, "cache_full"),
        ("ring", 40, "length"),
    ],
)
def test_overflow_counts_as_in_the_library(outcome, name, tokens, reason):
    told = report(outcome(name))
    assert (told["completion_tokens"], told["finish_reason"]) == (tokens, reason)
    assert told["cache"]["overwritten"] == (320 if name == "ring" else 0)


def test_sampling_flags_reach_the_sampler(outcome):
    told = report(outcome("sampling"))
    assert told["completion_tokens"] == 8
    assert 65 not in told["tokens"]


FIELDS = {
    "temperature": ("0.7", 0.7),
    "top_k": ("20", 20),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.01", 0.01),
    "repetition_penalty": ("1.1", 1.1),
    "frequency_penalty": ("0.1", 0.1),
    "presence_penalty": ("-0.1", -0.1),
    "logit_bias": ("65:-100,66:2.5,67:-inf", {65: -100.0, 66: 2.5, 67: -math.inf}),
    "seed": ("3", 3),
    "stop": ("a,b", ("a,b",)),
    "stop_token_ids": ("1,2", (1, 2)),
    "logprobs": ("2", 2),
}


@pytest.fixture(scope="module")
def flag_values():
    """The flags of `request.define_flags`, apart from other tests'."""
    found = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("string", "integer", "float", "list", "multi_string"):
            name = f"DEFINE_{kind}"
            define = functools.partial(getattr(flags, name), flag_values=found)
            patch.setattr(request.flags, name, define)
        request.define_flags()
    return found


def test_there_is_a_flag_for_every_field_and_its_value_is_taken(
    flag_values, monkeypatch
):
    monkeypatch.setattr(request, "FLAGS", flag_values)
    assert {field.name for field in dataclasses.fields(mj.SamplingParams)} == {*FIELDS}
    flag_values(["generate"])
    assert request.sampling_params() == mj.SamplingParams()
    for name, (text, value) in FIELDS.items():
        flag_values.unparse_flags()
        flag_values(["generate", f"--{name}={text}"])
        expected = mj.SamplingParams(**{name: value})
        assert getattr(request.sampling_params(), name) == getattr(expected, name)


def test_stop_ids_and_stop_strings_end_the_text(outcome):
    told = report(outcome("stop id"))
    assert (told["tokens"], told["text"], told["finish_reason"]) == ([90], "", "stop")
    told = report(outcome("stop"))
    assert told["tokens"] == [90, 90, 90]
    assert (told["text"], told["finish_reason"]) == ("", "stop")


def test_a_tokenizer_brings_its_ids_and_eos(outcome):
    told = report(outcome("tokenizer"))
    assert told["prompt_tokens"] == 2
    assert set(told["tokens"]) <= set(range(11))
    assert told["config"]["eos_token_ids"] == [10]
    ended = told["finish_reason"] == "stop"
    assert ended == (told["tokens"][-1] == 10)
    assert "<end>" not in told["text"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_ctrl_c_ends_with_what_there_is(form):
    """The first letters are out, or the work has begun; then the signal comes."""
    arguments = ("--prompt=a", "--overflow=ring", "--max_new_tokens=1000000")
    process = subprocess.Popen(
        [*COMMAND, *arguments, *(["--json"] if form == "json" else [])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = b""
    if form == "text":
        first = os.read(process.stdout.fileno(), 1)
    else:  # nothing comes on stdout: it has begun once it has told of the weights
        first_note = process.stderr.readline()
        assert b"random" in first_note
        time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    if form == "json":
        told = json.loads(out)
        assert told["finish_reason"] == "interrupted"
        assert len(told["tokens"]) == told["completion_tokens"]
    else:
        assert len(first) == 1
        assert b"ended by interrupted" in errors


def test_a_reader_that_leaves_is_no_traceback():
    line = f"{' '.join(COMMAND)} --prompt=a --max_new_tokens=200 | head -c 1"
    outcome = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True)
    assert len(outcome.stdout) == 1
    assert b"Traceback" not in outcome.stderr
    assert b"Exception" not in outcome.stderr


def test_a_chat_prefills_only_what_is_new():
    # Bytes that are text, so that a reply encodes to the tokens that it came from.
    bias = ",".join(f"{byte}:50" for byte in range(97, 123))
    done = run(
        *("--chat", "--system=be short", "--max_new_tokens=10", f"--logit_bias={bias}"),
        given="hello\n\nand again\n/reset\nhello\n"
        + "long " * 100
        + "\nhello\n/exit\nno",
    )
    assert done.returncode == 0, done.stderr
    replies = done.stdout.splitlines()
    assert [len(reply) for reply in replies] == [10] * 4
    _, first, second, third, refused, fourth = done.stderr.splitlines()
    system, user = len("system: be short\n"), len("user: hello\n")
    asked = system + user + len("assistant: ")
    assert first.startswith(f"[prompt {asked} tokens;")
    # The last token of a reply is sampled, but not in the cache yet.
    new = 1 + len("\nuser: and again\nassistant: ")
    assert second.startswith(f"[prompt {asked + 9 + new} tokens, {new} of them new;")
    assert third.startswith(f"[prompt {asked} tokens;")
    assert replies[2] == replies[0]
    assert "the cache holds 300" in refused
    assert "/reset" in refused
    new = 1 + len("\nuser: hello\nassistant: ")
    assert fourth.startswith(f"[prompt {asked + 9 + new} tokens, {new} of them new;")


# The check of the fit


def on_a_gpu(monkeypatch, gigabytes):
    device = devices.Device("some", "gpu", int(gigabytes * 1e9), memory_fraction=0.75)
    monkeypatch.setattr(generate.memory, "find_device", lambda name: device)
    return device


def test_the_plan_is_of_the_cache_that_a_generator_allocates(monkeypatch):
    on_a_gpu(monkeypatch, 20)
    config, policy = mj.Configs.small(), mj.CachePolicy(overflow="ring", num_sinks=4)
    plan = generate.planned(config, policy, 300)
    held = [leaf.nbytes for leaf in cache_leaves(config.resolve("gpu"), 512, policy)]
    assert plan.cache_bytes == sum(held)


def cache_leaves(config, capacity, policy):
    cache = jax.eval_shape(lambda: mj.init_cache(config, 1, capacity, policy=policy))
    leaves = jax.tree.leaves(cache)
    return [np.empty(leaf.shape, np.int16) for leaf in leaves if leaf.ndim > 1]


@pytest.mark.parametrize("gigabytes", [16, 19, 21, 27, 29])
@pytest.mark.parametrize("overflow", ["stop", "error"])
def test_what_a_refusal_advises_can_be_given_and_fits(monkeypatch, overflow, gigabytes):
    device = on_a_gpu(monkeypatch, gigabytes)
    config, policy = mj.Configs.xlarge(), mj.CachePolicy(overflow=overflow)
    plan = generate.planned(config, policy, 9000)
    assert not plan.fits
    least = 9000 if overflow == "error" else 5001
    text = generate.refusal(config, plan, least, trained=True)
    if "this fits" not in text:
        assert gigabytes < 21
        return
    words = text.split("GB: ")[1]
    assert "--batch_size" not in words
    assert "--context" not in words
    if "XLA_CLIENT_MEM_FRACTION=0.95 in the environment" in words:
        monkeypatch.setattr(
            *(generate.memory, "find_device"),
            lambda name: dataclasses.replace(device, memory_fraction=0.95),
        )
    given = re.findall(r"--config\.model\.(\w+)=(\w+)", words)
    values = {name: int(v) if v.isdigit() else v for name, v in given}
    config = config.replace(**values)
    assert config.max_kv_cache_len >= least
    tokens = min(9000, config.max_kv_cache_len)
    assert generate.planned(config, policy, tokens).fits


def test_a_prompt_cache_file_changes_how_long_it_takes_alone(tmp_path):
    """A run that makes it, one that uses it, a shorter prompt, another config."""
    kept, prompt = f"--prompt_cache={tmp_path / 'kept'}", "Once upon a time " * 17

    def tokens(*arguments):
        done = run("--json", "--temperature=0", "--max_new_tokens=4", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])["tokens"]

    asked = (f"--prompt={prompt}", "--prompt=Once upon another")
    without = [tokens(one) for one in asked]
    assert [tokens(one, kept) for one in (asked[0], *asked)] == [without[0], *without]
    done = run(*GREEDY, kept, "--config.model.rope_theta=500.0")
    assert done.returncode == 2
    assert "another config (rope_theta=10000.0 and not 500.0)" in done.stderr
    assert done.stderr.count("\n") == 1
