"""A run that is resumed keeps what it was begun with."""

import json

import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.testing import tiny_config
from minillm_jax.text.tokenizer import ByteTokenizer
from minillm_jax.training import run_folder
from minillm_jax.training.errors import DataError
from minillm_jax.training.settings import TrainSettings

CONFIG = tiny_config(vocab_size=256).resolve("cpu")
SETTINGS = TrainSettings(steps=10, batch_size=2)


def test_the_same_run_is_resumed(tmp_path):
    for _ in range(2):
        assert run_folder.begin(tmp_path, CONFIG, SETTINGS) == SETTINGS
    there = json.loads((tmp_path / "config.json").read_text())
    assert there["model"] == CONFIG.to_dict()
    assert there["train"]["steps"] == 10
    assert there["versions"]["jax"]


def test_what_changes_no_step_may_change(tmp_path):
    run_folder.begin(tmp_path, CONFIG, SETTINGS)
    other = SETTINGS.replace(keep=7, eval_every=3, checkpoint_every=9)
    assert run_folder.begin(tmp_path, CONFIG, other) == other


def test_automatic_rows_are_those_that_the_run_has(tmp_path):
    run_folder.begin(tmp_path, CONFIG, SETTINGS)
    automatic = SETTINGS.replace(batch_size="auto")
    assert run_folder.begin(tmp_path, CONFIG, automatic) == SETTINGS


def test_what_changes_a_step_is_refused_all_of_it_at_once(tmp_path):
    run_folder.begin(tmp_path, CONFIG, SETTINGS)
    config = CONFIG.replace(num_layers=3)
    settings = SETTINGS.replace(learning_rate=0.5, seed=3)
    with pytest.raises(mj.ConfigError) as error:
        run_folder.begin(tmp_path, config, settings, weights="other")
    for words in (
        "config.model.num_layers=3: the run has 2",
        "config.train.learning_rate=0.5: the run has 0.0003",
        "config.train.seed=3: the run has 0",
        "weights from other",
        "another --workdir",
    ):
        assert words in str(error.value)


def test_the_data_is_made_once(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some words " * 100)
    settings = SETTINGS.replace(data=str(text))
    made = run_folder.documents(tmp_path / "run", CONFIG, settings, ByteTokenizer())
    assert made.facts["source"] == str(text)
    text.unlink()
    again = run_folder.documents(tmp_path / "run", CONFIG, settings, ByteTokenizer())
    np.testing.assert_array_equal(made.tokens, again.tokens)


def test_data_of_another_source_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("some words " * 100)
    for_a, for_b = (SETTINGS.replace(data=str(tmp_path / name)) for name in "ab")
    run_folder.documents(tmp_path / "run", CONFIG, for_a, ByteTokenizer())
    with pytest.raises(DataError, match=r"was made of source=.*a, not .*b"):
        run_folder.documents(tmp_path / "run", CONFIG, for_b, ByteTokenizer())


def test_a_models_folder_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(mj.ConfigError, match="is not a run's"):
        run_folder.begin(tmp_path, CONFIG, SETTINGS)
    with pytest.raises(mj.ConfigError, match="is not a run's"):
        run_folder.has_begun(tmp_path)


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
    folder = tmp_path / "run"
    again = pytest.raises(mj.ConfigError, match="another process trains there")
    with run_folder.lock(folder), again, run_folder.lock(folder):
        pass
    with run_folder.lock(folder):
        pass


def test_data_that_is_not_there_is_told(tmp_path):
    settings = SETTINGS.replace(data=str(tmp_path / "none"))
    with pytest.raises(DataError, match="no such file"):
        run_folder.documents(tmp_path, CONFIG, settings, ByteTokenizer())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 6, "accumulation": 4}, "write 8"),
        ({"batch_size": "all"}, "auto"),
        ({"steps": 0}, "steps=0"),
        ({"lerning_rate": 1.0}, "did you mean learning_rate?"),
        ({"final_share": 2.0}, "final_share"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, words):
    with pytest.raises(mj.ConfigError, match=words.replace("?", r"\?")):
        TrainSettings(**given)
