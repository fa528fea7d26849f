"""A small finished run on scikit-learn's digits, trained once in each test process."""

import functools
import pathlib
import tempfile

from mnist_flax.config import Config, replace

CONFIG = replace(
    Config(),
    data__name="digits",
    data__num_train=700,
    data__holdout=100,
    model__widths=(4, 6),
    model__pools=(2,),
    model__dense=(16,),
    optimizer__learning_rate=1e-2,
    train__batch_size=50,
    train__epochs=3,
    train__log_every_steps=4,
    train__tensorboard=False,
    train__report=False,
    train__demo=False,
    eval__batch_size=120,
)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    from mnist_flax.train import fit

    folder = tempfile.TemporaryDirectory()
    fit(CONFIG, pathlib.Path(folder.name, "tiny"))
    return folder


def workdir() -> pathlib.Path:
    """The folder of the run; a test that changes something in it makes a copy first."""
    return pathlib.Path(_folder().name, "tiny")
