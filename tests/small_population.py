"""Small finished populations on scikit-learn's digits, trained once in each test process."""

import functools
import pathlib
import tempfile
from typing import Any

from mnist_flax.config import Config, replace

CONFIG = replace(
    Config(),
    seed=3,
    data__name="digits",
    data__num_train=220,
    data__holdout=20,
    model__widths=(4,),
    model__pools=(4,),
    model__dense=(8,),
    model__dropout=0.2,
    augment__shift=1,
    optimizer__learning_rate=0.02,
    optimizer__ema_decay=0.9,
    train__batch_size=25,
    train__epochs=2,
    train__log_every_steps=3,
    train__tensorboard=False,
    train__report=False,
    train__demo=False,
    eval__batch_size=120,
)


@functools.cache
def _folder(kind: str) -> tempfile.TemporaryDirectory[str]:
    from mnist_flax.train import fit_population

    folder = tempfile.TemporaryDirectory()
    sizes: dict[str, Any] = {kind: 3}
    fit_population(CONFIG, pathlib.Path(folder.name, kind), **sizes)
    return folder


def seeds() -> pathlib.Path:
    """The folder of a population with seeds 3, 4 and 5; a test that changes something in it makes a copy first."""
    return pathlib.Path(_folder("seeds").name, "seeds")


def folds() -> pathlib.Path:
    """The folder of a population: 220 rows in three folds, whose sizes therefore differ."""
    return pathlib.Path(_folder("folds").name, "folds")
