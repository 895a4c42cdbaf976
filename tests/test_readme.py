"""The README's Python is run as it stands, and its preset table compared."""

import pathlib
import re

import minillm_jax as mj

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 10, 32000)
    assert names["cache"]["lengths"].tolist() == [15]


def test_the_preset_table_of_the_readme_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| ([\d |]+) \|", README, re.M)
    assert [name for name, _ in rows] == list(mj.Configs.names)
    for name, cells in rows:
        config = mj.Configs.by_name(name)
        assert [int(cell) for cell in cells.split("|")] == [
            config.max_seq_len,
            config.max_kv_cache_len,
            config.dim_model,
            config.num_heads,
            config.num_layers,
            config.dim_ff,
        ]


def test_there_are_exactly_two_set_up_lines():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("-m benchmarks.decode --config=configs/small.py")
    assert lines[1].endswith("-m pytest")
