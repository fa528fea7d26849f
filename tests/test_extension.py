"""Extensions: a script outside the package adds one entry to each registry, and training and other verbs use them."""

import gzip
import json
import pathlib
import re
import struct

import forked
import numpy as np
import pytest
from PIL import Image

from mnist_flax.run.checkpoint_files import restore

LAB = '''
"""A laboratory outside the package: seven entries, and every verb knows them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mnist_flax import cli, logged, losses, models, optimizer
from mnist_flax.data import augment, registry
from mnist_flax.models.base import ModelConfig
from mnist_flax.models.layers import BatchNorm, Conv, Dense, flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwinConfig(ModelConfig):
    """Two branches that see the image side by side."""

    width: int = 4

    def module(self, num_classes, *, train=False):
        return Twin(self.width, num_classes, train)


class Twin(nn.Module):
    """A 3x3 and a 5x5 convolution side by side, normalised, pooled and added."""

    width: int
    num_classes: int
    train: bool

    @nn.compact
    def __call__(self, x, mask=None):
        near = Conv(self.width, 3, train=self.train)(x)
        far = Conv(self.width, 5, train=self.train)(x)
        x = BatchNorm(activation=nn.relu, pool=4, train=self.train)(near + far, mask)
        return Dense(self.num_classes)(flatten(x))


def focal(logits, labels, *, label_smoothing):
    """Lin et al. (2017), with gamma = 1."""
    losses_ = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-losses_)) * losses_


def speckle(share, image, key):
    return jnp.where(jax.random.bernoulli(key, share, image.shape), jnp.uint8(0), image)


models.MODELS["twin"] = TwinConfig
registry.DATASETS["bars"] = registry.Dataset(num_classes=3, num_train=90, num_test=30, class_names=("a", "b", "c"))
optimizer.OPTIMIZERS["lion"] = optimizer.Optimizer(
    lambda o, rate: optax.lion(rate, o.b1, o.b2, weight_decay=o.weight_decay, mask=optimizer.decay_mask),
    ("b1", "b2", "weight_decay"),
)
optimizer.SCHEDULES["halves"] = optimizer.Schedule(
    lambda o, run: optax.exponential_decay(o.learning_rate, run.steps_per_epoch, 0.5, staircase=True)
)
augment.AUGMENTATIONS["speckle"] = augment.Augmentation("share of blanked pixels", 1, change=speckle)
losses.LOSSES["focal"] = focal
logged.METRICS["grad_norm"] = lambda view: optax.global_norm(view.grads) * jnp.sum(view.is_example)

if __name__ == "__main__":
    cli.main()
'''

PRESET = """
from mnist_flax.config import default_config_dict


def get_config():
    config = default_config_dict(model="twin")
    config.model.width = 6
    config.data.name = "bars"
    config.data.holdout = 15
    config.augment.speckle = 0.1
    config.optimizer.name = "lion"
    config.optimizer.schedule = "halves"
    config.optimizer.learning_rate = 3e-3
    config.train.loss = "focal"
    config.train.batch_size = 16
    config.train.epochs = 4
    config.train.log_every_steps = 2
    config.eval.batch_size = 45
    return config
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the laboratory, its preset, and its dataset in IDX files: bars at three heights."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab.py").write_text(LAB)
    (folder / "preset.py").write_text(PRESET)
    (folder / "raw" / "bars").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 90), ("t10k", 30)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 8 * label : 8 + 8 * label, 4:24] = 255
        for name, array in ((f"{split}-images-idx3", images), (f"{split}-labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / "raw" / "bars" / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    picture = np.full((100, 80), 255, np.uint8)
    picture[10:20, 10:70] = picture[10:90, 60:70] = 0  # strokes of a seven
    Image.fromarray(picture).save(folder / "seven.png")
    return folder


def use(lab: pathlib.Path, *arguments: str) -> str:
    """Runs a verb with the laboratory's entries and returns what it prints."""
    done = forked.run(str(lab / "lab.py"), *arguments, cwd=lab)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.smoke
def test_entries_from_outside_work_in_train_report_evaluate_and_predict(lab: pathlib.Path) -> None:
    train = ("main", "--config=preset.py", "--config.data.raw_dir=raw", "--workdir=run")
    use(lab, *train, "--config.train.epochs=2", "--noconfig.train.report", "--noconfig.train.demo")
    output = use(lab, *train)
    assert "resuming run at step 10 of 20" in output
    summary = json.loads((lab / "run" / "summary.json").read_text())
    assert (summary["dataset"], summary["test_examples"], summary["steps"]) == ("bars", 30, 20)
    assert summary["test_accuracy"] > 0.9
    lines = [json.loads(line) for line in (lab / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if line["split"] == "train"]
    assert len(norms) == 12 and all(0 < norm < 1000 for norm in norms)
    rates = {line["learning_rate"] for line in lines if line["split"] == "train"}
    assert sorted(rates) == pytest.approx([3.75e-4, 7.5e-4, 1.5e-3, 3e-3], rel=1e-5)
    page = (lab / "run" / "report" / "index.html").read_text()
    assert "Conv_1" in page and "BatchNorm_0" in page
    assert "lab.py main --config=run/report/config.py" in page  # how to repeat the run
    setup = restore(lab / "run" / "checkpoints" / "20", "record")["origin"]["setup"]
    assert setup.keys() - {"XLA_FLAGS"} == {"driver", "devices", "lab.py"}
    with (lab / "lab.py").open("a") as script:
        script.write("# changed\n")
    said = use(lab, "report", "--workdir=run", "--config.data.raw_dir=raw")
    assert said.count("this code has changed since the run began: lab.py") == 1
    assert "bars, test: " in use(lab, "evaluate", "--workdir=run", "--config.data.raw_dir=raw")
    (line,) = (
        line for line in use(lab, "predict", "--workdir=run", "--json", "seven.png").splitlines() if "digits" in line
    )
    (digit,) = json.loads(line)["digits"]
    assert digit["label"] == ("a", "b", "c")[digit["digit"]]
    (row,) = (line for line in use(lab, "predict", "--workdir=run", "seven.png").splitlines() if "seven.png" in line)
    assert re.match(rf"seven\.png +{digit['label']}\?? ", row) and {"a", "b", "c"} <= set(row.split())
