"""The plan's command line: its table, JSON, picture, presets, and bad input."""

import importlib.util
import json

import pytest

import minillm_jax as mj
from minillm_jax.cli import plan_plot
from minillm_jax.planning import devices
from tests import commands


def run(*arguments):
    return commands.run("minillm_jax.cli.plan", *arguments)


def test_the_table_tells_what_fits_in_a_screen():
    done = run("--config=configs/large.py", "--device=rtx4090", "--batch_size=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fits: ")
    assert len(lines) <= 32
    assert all(len(line) <= 80 for line in lines)
    for words in ("weights", "cache", "XLA_CLIENT_MEM_FRACTION", "Most rows of 8192"):
        assert words in done.stdout


def test_what_does_not_fit_is_told_with_what_would():
    done = run("--config=xlarge", "--device=t4")
    assert done.returncode == 0
    assert done.stdout.startswith("DOES NOT FIT: ")
    flags = done.stdout.split("This fits, with ")[1].split("GB: ")[1].split()
    again = run("--config=xlarge", "--device=t4", *flags)
    assert again.stdout.startswith("fits: ")


def test_json_is_the_plan():
    done = run("--config=large", "--device=h200", "--json", "--batch_size=auto:4")
    found = json.loads(done.stdout)
    plan = mj.plan_memory(mj.Configs.large(), 4, device="h200")
    assert found["batch_size"] == 4
    assert found["total_bytes"] == plan.total_bytes
    assert found["bytes_by_class"] == plan.bytes_by_class
    assert found["max_context"] == plan.max_context
    assert found["config"] == plan.config.to_dict()
    assert [bound["batch_size"] for bound in found["best_case"]] == [
        *(1, 4, plan.max_batch_size)
    ]
    assert found["advice"]
    assert found["device"]["source"].startswith("https://")


def test_figures_given_replace_those_of_a_device():
    given = ["--memory_gb=48", "--bandwidth_gbs=900", "--tflops=100"]
    found = json.loads(run("--config=small", "--json", *given).stdout)
    assert found["limit_bytes"] == 36e9
    assert found["device"]["bytes_per_second"] == 900e9
    given = ["--device=h200", "--memory_fraction=0.9"]
    found = json.loads(run("--config=small", "--json", *given).stdout)
    assert found["limit_bytes"] == int(0.9 * 141e9)
    assert found["device"]["bytes_per_second"] == 4.8e12


def test_all_presets_on_all_devices():
    done = run("--all")
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert all(len(row) == 5 for row in rows)
    names = [row[0].split(",")[0].strip() for row in rows[5:]]
    assert names == list(devices.DEVICES)
    found = json.loads(run("--all", "--json").stdout)
    assert len(found) == len(mj.Configs.names) * len(devices.DEVICES)


def test_training_on_all_devices_has_no_cache():
    done = run("--all", "--train")
    assert "weights" in done.stdout
    assert "cache" not in done.stdout


def test_what_the_rates_are_of_is_told_and_what_is_missing_for_them():
    done = run("--config=small", "--memory_gb=48", "--bandwidth_gbs=900")
    assert "No best case: give --bandwidth_gbs and --tflops." in done.stdout
    done = run("--config=small", "--device=l4", "--context=600")
    assert "tok/s: all rows together, each holding 600 tokens." in done.stdout
    done = run("--config=small", "--device=l4", "--train")
    assert "best case" not in done.stdout


def test_what_is_estimated_beside_exact_bytes_is_told():
    asked = ["--config=small", "--device=cpu", "--config.model.num_layers=1"]
    done = run(*asked, "--exact")
    assert "bytes above are XLA's; all below is estimated" in done.stdout
    assert json.loads(run(*asked, "--exact", "--json").stdout)["exact"]
    assert "estimated" not in run(*asked).stdout


def test_training_is_planned_too():
    found = json.loads(run("--config=small", "--device=t4", "--train", "--json").stdout)
    assert found["plan"] == "training"
    classes = found["bytes_by_class"]
    assert classes["optimizer"] == 2 * classes["weights"]
    assert found["best_case"] == []


def test_an_automatic_cache_is_the_longest_of_the_device():
    asked = ["--config=large", "--device=rtx4090", "--json"]
    done = run(*asked, "--config.model.max_kv_cache_len=auto")
    found = json.loads(done.stdout)
    plan = mj.plan_memory(mj.Configs.large(), device="rtx4090")
    assert found["config"]["max_kv_cache_len"] == found["context"] == plan.max_context
    done = run(*asked, "--config.model.max_kv_cache_len=auto:6000")
    assert json.loads(done.stdout)["context"] == 6000


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)
@pytest.mark.parametrize("kind", ["--train", "--notrain"])
def test_the_picture_is_a_png(tmp_path, kind):
    path = tmp_path / "plan.png"
    done = run("--config=medium", "--device=l4", f"--plot={path}", kind)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("device", ["h200", "t4"])
@pytest.mark.parametrize("context", [1, 300, 4096, 10**6])
def test_the_picture_goes_beyond_what_is_planned_but_not_far(context, device):
    plan = mj.plan_memory(mj.Configs.small(), context=context, device=device)
    drawn = plan_plot._contexts(plan)
    assert drawn == sorted(set(drawn))
    assert len(drawn) > 8
    assert context < drawn[-1] <= max(16 * context, 512)
    shorter = min(plan.max_context, 8 * context)
    assert shorter < drawn[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--config is missing; or give --model=FOLDER, or --all"),
        (("--config=small", "--all"), "--all: plans the presets"),
        (("--all", "--device=t4", "--plot=a.png"), "leave --device, --plot out"),
        (("--all", "--batch_size=1"), "leave --batch_size out"),
        (("--all", "--memory_gb=4", "--json"), "leave --memory_gb out"),
        (("--all", "--noexact", "--context=64"), "leave --context, --exact out"),
        (("--config=small", "--device=h300"), "did you mean h200"),
        (("--config=small", "--device="), "device='': must be one of"),
        (("--config=small", "--batch_size=many"), "batch_size='many': must be"),
        (("--config=small", "--context=0"), "context=0: must be"),
        (("--config=small", "--batch_size=-1"), "batch_size=-1: must be a number in"),
        (("--config=small", f"--batch_size={5000 * '9'}"), "must be a number in [1,"),
        (("--config=small", "--batch_size=auto: 5"), "batch_size='auto: 5': must be"),
        (("--config=small", "--memory_gb=-1"), "--memory_gb=-1.0: must be"),
        (("--config=small", "--memory_gb=nan"), "--memory_gb=nan: must be"),
        (("--config=small", "--memory_gb=inf"), "--memory_gb=inf: must be"),
        (("--config=small", "--tflops=nan"), "--tflops=nan: must be"),
        (("--config=small", "--tflops=0"), "--tflops=0.0: must be"),
        (("--config=small", "--bandwidth_gbs=0"), "--bandwidth_gbs=0.0: must be"),
        (("--config=small", "--memory_fraction=nan"), "--memory_fraction=nan: must"),
        (("--config=small", "--device=t4", "--exact"), "exact=True"),
        (("--config=small", "--plot=/nowhere/x.png", "--device=t4"), "/nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
