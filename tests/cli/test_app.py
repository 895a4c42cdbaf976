"""Bad input on the command line: one clear line, exit code 2, no traceback."""

import gc
import signal
import sys
import time

import pytest

from minillm_jax.cli import app
from tests import commands

CONFIG_FILES = {
    "raises.py": "def get_config():\n    x = 1\n    raise RuntimeError('no\\nluck')\n",
    "value_error.py": "def get_config():\n    return int('x')\n",
    "syntax.py": "def get_config(:\n",
    "imports.py": "import no_such_module_here\n\ndef get_config():\n    pass\n",
    "empty.py": "def get_config():\n    return {}\n",
    "none.py": "def get_config():\n    pass\n",
    "no_function.py": "x = 1\n",
    "leaves.py": "import sys\n\ndef get_config():\n    sys.exit(0)\n",
}
# Arguments -> words that the line must hold.
CASES = {
    "": ("--config", "small, medium, large, xlarge"),
    "--config=nowhere.py": ("nowhere.py", "no such file", "small"),
    "--config=smal": ("smal", "did you mean small?"),
    "--config=TMP/raises.py": ("raises.py:3", "RuntimeError", "no luck"),
    "--config=TMP/value_error.py": ("value_error.py:2", "ValueError"),
    "--config=TMP/syntax.py": ("syntax.py:1", "SyntaxError"),
    "--config=TMP/imports.py": ("imports.py:1", "no_such_module_here"),
    "--config=TMP/empty.py": ("section", "'model'"),
    "--config=TMP/none.py": ("get_config()", "None"),
    "--config=TMP/no_function.py": ("no_function.py", "get_config"),
    "--config=TMP/leaves.py": ("leaves.py:4", "SystemExit"),
    "--config=configs/small.py:large": ("configs/small.py", "get_config()"),
    "--config=small --config=medium": ("--config", "2 times"),
    "--config=small --config.modle.dim_model=8": ("modle", "did you mean model?"),
    "--config=small --config.model.d_model=8": ("d_model", "write dim_model"),
    "--config=small --config.decode.json_path=/nowhere/x.json": ("/nowhere/x.json",),
    "--config=small --config.model.dim_modle=3": (
        "--config.model.dim_modle",
        "did you mean dim_model?",
    ),
    "--config=small --config.model.num_heads=7": ("num_heads=7", "dim_model=512", "8"),
    "--config=small --config.model.max_kv_cache_len=1023": (
        "max_kv_cache_len=1023",
        "max_seq_len=1024",
        "2048",
    ),
    "--config=small --config.model.num_layers=-1": ("num_layers=-1", "write 1"),
    "--config=small --config.model.vocab_size=0": ("vocab_size=0", "write 1"),
    "--config=small --config.model.max_kv_cache_len=99999999999999999999": (
        "max_kv_cache_len",
        "16777216",
    ),
    "--config=small --config.model.norm_eps=nan": ("norm_eps=nan", "number"),
    "--config=small --config.model.dim_model=many": ("dim_model", "many"),
    "--config=small --config.model.dtype=bf16": ("dtype", "did you mean bfloat16?"),
    "--config=small --config.decode.batch_size=0": ("batch_size=0", "write 1"),
    "--config=small --config.decode.contexts=20": ("contexts", "new_tokens=32"),
    "--config=small --config.decode.contexts=4096": ("4096", "max_kv_cache_len=2048"),
    "--config=small --config.decode.capacity=64": ("capacity=64", "write 128"),
    "--config=small --config.model.vocab_size=200": ("vocab_size=200", "256"),
    "--config=xlarge --config.model.dim_ff=2000000": (
        "does not fit",
        "GB",
        "--config",
    ),
    "--config=small stray words": ("stray arguments", "stray words"),
    "--config=small --nonsense=3": ("nonsense",),
    "--config.model.dim_model=8 --config=small": ("--config",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs")
    for name, text in CONFIG_FILES.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize("arguments", CASES)
def test_a_mistake_ends_in_one_clear_line_and_exit_code_2(folder, arguments):
    filled = arguments.replace("TMP", str(folder)).split()
    outcome = commands.run("benchmarks.decode", *filled)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1, outcome.stderr
    for word in ("error: ", *CASES[arguments]):
        assert word in lines[0]


def test_an_interrupt_that_a_callback_drops_comes_again(monkeypatch):
    """As one does that comes during JAX's callback of the garbage collector."""
    monkeypatch.setattr(sys, "unraisablehook", app._interrupt_again)

    def interrupted(phase, info):
        gc.callbacks.remove(interrupted)
        signal.raise_signal(signal.SIGINT)

    def wait():
        gc.collect()
        for _ in range(1000):
            time.sleep(0.01)

    gc.callbacks.append(interrupted)
    with pytest.raises(KeyboardInterrupt):
        wait()
