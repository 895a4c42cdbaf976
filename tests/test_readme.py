"""The README's Python is run as it stands, and its preset table compared."""

import collections
import functools
import pathlib
import re
import shlex

from absl import flags

import minillm_jax as mj
from benchmarks import fit
from minillm_jax import testing
from minillm_jax.cli import config_files, generate, plan_report
from minillm_jax.planning.devices import Device

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 9
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 10, 32000)
    assert names["cache"]["lengths"].tolist() == [15]
    assert [len(completion.tokens) for completion in names["out"]] == [16, 16]
    assert names["piece"].finish_reason is not None
    assert names["model"].config == mj.create_model(mj.Configs.small()).config
    assert (tmp_path / "small" / "model.safetensors").is_file()
    plan = names["plan"]
    found = f"{plan.fits} {plan.batch_size} {plan.max_context}"
    assert f"plan.max_context)  # {found}\n" in README
    counts = re.search(r"print\(generator.compilations\)\n# (.*)", README).group(1)
    assert str(names["generator"].compilations) == counts


def test_a_generator_of_small_has_as_many_executables_as_the_readme_says(tiny_params):
    small = mj.Configs.small()
    names = ("max_seq_len", "max_kv_cache_len", "prefill_chunk")
    same = {name: getattr(small, name) for name in names}
    model = mj.create_model(testing.tiny_config(**same))
    generator = mj.Generator(model, tiny_params)
    found = collections.Counter(key.name for key in generator._executables.keys(1))
    told = {}
    for names, counts in re.findall(
        r"^\| (`[^|]*) \|[^|]*\| ([\d, ]+) \|$", README, re.M
    ):
        told |= zip(re.findall(r"`(\w+)`", names), counts.split(", "), strict=True)
    assert {name: int(count) for name, count in told.items()} == found


def test_the_memory_table_is_the_planners():
    assert plan_report.markdown(plan_report.presets_by_device()) in README


def test_the_plan_shown_is_the_planners(capsys):
    plan = mj.plan_memory(mj.Configs.large(), 16, device="rtx4090")
    plan_report.show(plan)
    shown = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
    assert "\n".join(shown) in README


def test_the_refusal_shown_is_the_planners():
    device = Device("AMD EPYC, 2 cores", "cpu", int(22.3e9))
    settings = config_files.decode_settings(config_files.preset("xlarge"))
    plan = fit.plan_for(mj.Configs.xlarge(), settings, device)
    assert plan.refusal() in " ".join(README.split())


def test_the_generate_lines_of_the_readme_are_right(monkeypatch):
    found = flags.FlagValues()
    for kind in ("string", "integer", "float", "list", "multi_string", "bool", "enum"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=found)
        monkeypatch.setattr(flags, f"DEFINE_{kind}", define)
    flags.DEFINE_string("config", None, "")
    flags.DEFINE_string("model", None, "")
    generate.define_flags()
    lines = re.findall(r"^python -m minillm_jax\.cli\.generate (.*)$", README, re.M)
    assert len(lines) >= 5
    for line in lines:
        found.unparse_flags()
        assert found(["generate", *shlex.split(line)]) == ["generate"]
        assert found["config"].value in (None, *mj.Configs.names)


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
    assert lines[1].endswith("-m pytest -n 2 --dist loadfile")
