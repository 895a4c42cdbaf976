"""A run from its first step to its last, and what may come between."""

import csv

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax.testing import perturbed, reference_logits, tiny_config
from minillm_jax.text.tokenizer import ByteTokenizer
from minillm_jax.training import corpus, metrics, step, train
from minillm_jax.training.errors import TrainingError
from minillm_jax.training.packing import Packing
from minillm_jax.training.settings import TrainSettings
from minillm_jax.training.sources import Document
from minillm_jax.weights.errors import CheckpointError

CONFIG = tiny_config(vocab_size=256, num_layers=1)
SETTINGS = TrainSettings(
    steps=12,
    batch_size=4,
    seq_len=24,
    learning_rate=1e-2,
    warmup_steps=2,
    eval_every=4,
    checkpoint_every=3,
    tensorboard=False,
)
EXACT = ("step", "loss", "val_loss", "learning_rate", "grad_norm", "val_bits_per_byte")


@pytest.fixture(scope="module")
def model():
    return mj.create_model(CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, 5))) for _ in range(30)]
    texts = [" ".join(draw.choice(words, 60)) for _ in range(20)]
    return corpus.make(
        tmp_path_factory.mktemp("data") / "c",
        [Document(str(i), text) for i, text in enumerate(texts)],
        ByteTokenizer(),
        vocab_size=256,
        facts={},
    )


@pytest.fixture
def opened(model, data):
    """Opens a run in a folder; closes all of them at the end."""
    runs = []

    def begin(folder, **changes):
        folder.mkdir(exist_ok=True)
        trainer = train.Trainer(model, SETTINGS.replace(**changes), data, folder)
        runs.append(trainer)
        trainer.start(lambda: mj.init_params(model, seed=1))
        return trainer

    yield begin
    for trainer in runs:
        trainer.close()


def exact(folder):
    """What of a run's metrics depends on no clock."""
    return [tuple(r[n] for n in EXACT) for r in metrics.read(folder / metrics.CSV)]


def after(count):
    """Stops when it has been asked `count` times."""
    asked = iter(range(count))
    return lambda: next(asked, None) is None


def test_a_run_learns_and_writes_every_step_once(opened, tmp_path):
    rows = []
    trainer = opened(tmp_path)
    assert trainer.run(on_row=rows.append)
    assert [row.step for row in rows] == list(range(1, 13))
    assert rows[-1].loss < rows[0].loss - 0.5
    assert [row.step for row in rows if row.val_loss is not None] == [4, 8, 12]
    assert rows[-1].val_bits_per_byte == pytest.approx(rows[-1].val_loss / np.log(2))
    assert rows[0].tokens_per_second is None
    assert rows[2].tokens_per_second > 0
    with (tmp_path / "metrics.csv").open(newline="") as file:
        written = [row["loss"] for row in csv.DictReader(file)]
    assert written == [str(row.loss) for row in rows]
    assert [saved.step for saved in trainer.checkpoints.saved()] == [9, 12]


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(opened, tmp_path, stop):
    whole = opened(tmp_path / "whole")
    whole.run()
    first = opened(tmp_path / "cut")
    assert not first.run(after(stop))
    first.close()
    again = opened(tmp_path / "cut")
    assert again.done == stop
    assert again.run()
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    chex.assert_trees_all_equal(again.best_params(), whole.best_params())


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(opened, tmp_path):
    whole = opened(tmp_path / "whole")
    whole.run()
    killed = opened(tmp_path / "cut")

    def kill(row):
        if row.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.run(on_row=kill)
    killed.close()
    again = opened(tmp_path / "cut")
    assert again.done == 6
    again.run()
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")


def test_the_best_checkpoint_is_what_comes_out(opened, tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: next(losses))
    trainer = opened(tmp_path, eval_every=4, checkpoint_every=4)
    kept = []
    save = trainer.checkpoints.save

    def keep(step, state, **about):
        kept.append(jax.tree.map(np.array, dict(state.params)))
        save(step, state, **about)

    monkeypatch.setattr(trainer.checkpoints, "save", keep)
    trainer.run()
    chex.assert_trees_all_equal(trainer.best_params(), kept[1])


def test_a_loss_that_is_not_finite_stops_the_run(opened, tmp_path, monkeypatch):
    whole = step.train_step

    def broken(model, optimizer, state, *batch, **options):
        state, found = whole(model, optimizer, state, *batch, **options)
        bad = jnp.where(state.step == 8, jnp.nan, found.loss)
        return state, found._replace(loss=bad)

    monkeypatch.setattr(step, "train_step", broken)
    trainer = opened(tmp_path)
    with pytest.raises(TrainingError) as error:
        trainer.run()
    for words in ("step 8", "nan", "batch 7 of seed 0", "of step 6"):
        assert words in str(error.value)
    assert [row[0] for row in exact(tmp_path)] == [str(i) for i in range(1, 8)]


def test_metrics_are_read_a_step_late(opened, tmp_path, monkeypatch):
    """The device has a step to do while the host looks at the one before."""
    order = []
    trainer = opened(tmp_path, steps=3, eval_every=100, checkpoint_every=100)
    dispatch, settle = trainer._dispatch, trainer._settle

    def spy_dispatch(batch):
        order.append(f"dispatch {trainer.done + 1}")
        return dispatch(batch)

    def spy_settle(pending, **options):
        if pending is not None:
            order.append(f"read {pending.number}")
        settle(pending, **options)

    monkeypatch.setattr(trainer, "_dispatch", spy_dispatch)
    monkeypatch.setattr(trainer, "_settle", spy_settle)
    trainer.run()
    assert order == [
        *("dispatch 1", "dispatch 2", "read 1"),
        *("dispatch 3", "read 2", "read 3"),
    ]


def test_validation_is_the_mean_over_every_token_of_the_split(opened, tmp_path, data):
    trainer = opened(tmp_path)
    params = perturbed(trainer._state.params)  # some tokens are likelier than others
    trainer._state = trainer._state._replace(params=params)
    packing = Packing(data, data.split(validation=True), 24, seed=SETTINGS.seed)
    losses = []
    for tokens, segment_ids in zip(*packing.batch(0, packing.num_rows), strict=True):
        for segment in range(1, segment_ids.max() + 1):
            piece = tokens[segment_ids == segment]
            exact = reference_logits(CONFIG, params, piece[None])[0, :-1]
            below = np.log(np.exp(exact).sum(axis=-1))
            losses.extend(below - exact[np.arange(len(piece) - 1), piece[1:]])
    assert np.std(losses) > 0.3
    assert trainer.evaluate() == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_in_parts_is_the_same(opened, tmp_path):
    """A part of a batch at a time, as training: memory was planned for so much."""
    whole, parts = (
        opened(tmp_path / str(n), accumulation=n, eval_batches=2) for n in (1, 2)
    )
    shapes = []
    plain = step.eval_step

    def spy(model, params, tokens, segment_ids):
        shapes.append(tokens.shape)
        return plain(model, params, tokens, segment_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "eval_step", spy)
        assert parts.evaluate() == pytest.approx(whole.evaluate(), rel=1e-6)
    assert set(shapes[: len(shapes) // 3 + 1]) == {(2, 24)}
    assert set(shapes) == {(2, 24), (4, 24)}


def test_a_checkpoint_of_another_seed_is_told(opened, tmp_path):
    opened(tmp_path).run()
    with pytest.raises(CheckpointError, match="of a run of seed 0, not 7"):
        opened(tmp_path, seed=7)


def test_a_validation_loss_that_is_not_finite_saves_nothing(
    opened, tmp_path, monkeypatch
):
    trainer = opened(tmp_path)
    monkeypatch.setattr(trainer, "evaluate", lambda: float("nan"))
    with pytest.raises(TrainingError, match="step 4: validation loss nan"):
        trainer.run()
    assert [saved.step for saved in trainer.checkpoints.saved()] == [3]
