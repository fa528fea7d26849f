"""The model card of an export: training data, accuracy, limits, and how to load the files."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import POPULATION, Predictor, RunInfo
from mnist_flax.config import Config, differences
from mnist_flax.run import workdir as workdirs

FILE = "MODEL_CARD.md"

LIMITS = """\
- It takes one picture at a time of 28x28 grey pixels, 0 for the background and 255 for ink, framed like its training
  data. `python -m mnist_flax.predict` frames photographs and scans; the exported files do not.
- Every picture gets one of the classes; there is no answer for "none of them".
- Accuracy and calibration hold for data like the test set. On other people's handwriting both are worse.
- It was made for research and teaching, not for decisions about people."""

LICENCE = """\
The code that made it is under the Apache License 2.0. The training data have the terms of their publishers."""

LOADING = """\
Images are `u8[N,28,28,1]`; the results are `logits` and `probabilities`, `f32[N,{classes}]`, for any N. Scaling of
pixels, temperature, shifted views and committee are inside. Each file is made by its own command, such as
`python -m mnist_flax.export --workdir=DIR --format=onnx`.

onnxruntime (`--format=onnx`):

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
images = np.zeros((2, 28, 28, 1), np.uint8)
(probabilities,) = session.run(["probabilities"], {{"images": images}})
```

JAX, on CPU, CUDA and TPU, with this version of jax or a newer one (`--format=stablehlo`):

```python
import pathlib

import numpy as np
from jax import export

model = export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
images = np.zeros((2, 28, 28, 1), np.uint8)
probabilities = model.call(images)["probabilities"]
```

NumPy alone (`--format=npz` writes `model.npz` and `model.py`):

```python
import numpy as np
from model import predict

images = np.zeros((2, 28, 28, 1), np.uint8)
probabilities = predict(images)["probabilities"]
```

PyTorch, the weights for a network of your own (`--format=npz`):

```python
import numpy as np
import torch

weights = {{name: torch.from_numpy(array) for name, array in np.load("model.npz").items()}}
{torch}
```"""


def text(workdir: pathlib.Path, predictor: Predictor, info: RunInfo) -> str:
    """Returns the card as Markdown, from the results in the workdir; unknown values are omitted."""
    result = workdirs.read_json(workdir / (workdirs.SUMMARY if info.kind == "run" else POPULATION))
    robustness = workdirs.read_json(workdir / "robustness.json")
    evaluation = workdirs.read_json(workdir / f"evaluation-test-{info.config.data.name.replace('/', '-')}.json")
    results, facts = ({} if not isinstance(x, dict) else x for x in (result, evaluation))
    if facts.get("step") != max(info.steps):
        facts = {}
    classes = info.config.num_classes
    sections = {
        "Data": _table(_data(info)),
        "Recipe": _table(_recipe(predictor, info)),
        "Results": _table(_scores(results, facts, predictor, info)),
        "Robustness": _table(_robustness(robustness)),
        "Limits": LIMITS,
        "Licence": LICENCE,
        "How to load it": LOADING.format(classes=classes, torch=_torch(predictor)),
    }
    title = f"# A network for {info.config.data.name}"
    return "\n\n".join([title, *(f"## {name}\n\n{body}" for name, body in sections.items() if body), ""])


Rows = Iterator[tuple[str, str]]


def _table(rows: Rows) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _data(info: RunInfo) -> Rows:
    config = info.config
    yield "dataset", config.data.name
    yield "fingerprint", f"`{info.fingerprint}`"
    yield "rows trained on", f"{config.num_train:,}"
    yield "rows held out", f"{config.num_holdout:,}"


def _recipe(predictor: Predictor, info: RunInfo) -> Rows:
    config = info.config
    defaults = Config(model=type(config.model)())
    yield "networks", f"{len(predictor.members)}, whose probabilities are averaged" if info.kind != "run" else "1"
    yield "family", config.to_dict()["model"]["name"]
    yield (
        "parameters",
        f"{sum(leaf.size for leaf in jax.tree.leaves(predictor.members[0]['params'])):,} in each network",
    )
    yield "updates", f"{max(info.steps):,}, of {config.num_steps:,} in {config.train.epochs} epochs"
    yield "batch size", str(config.train.batch_size)
    yield "seed", str(config.seed)
    for field, (_, value) in sorted(differences(defaults, config).items()):
        if field not in ("seed", "train.batch_size", "train.epochs") and not field.startswith("data."):
            yield f"`config.{field}`", f"`{value!r}`"
    yield (
        "the exports compute in",
        "float32" + f" (trained in {config.model.dtype})" * (config.model.dtype != "float32"),
    )


def _scores(result: Mapping[str, Any], facts: Mapping[str, Any], predictor: Predictor, info: RunInfo) -> Rows:
    examples = result.get("test_examples") or result.get("committee", {}).get("examples")
    accuracy = result.get("test_accuracy", result.get("committee", {}).get("accuracy"))
    loss = result.get("test_loss", result.get("committee", {}).get("loss"))
    is_last = result.get("steps") == max(info.steps)
    if is_last and examples and accuracy is not None:
        low, high = metrics.wilson_interval(round(accuracy * examples), examples)
        yield "test accuracy", f"{accuracy:.2%} of {examples:,} images (95 % interval {low:.2%} to {high:.2%})"
        yield "test loss", f"{loss:.4f}"
    if "ece" in facts:
        yield "expected calibration error on the test set", f"{facts['ece']:.2%}"
        yield "Brier score on the test set", f"{facts['brier']:.4f}"
    yield "temperature", f"{predictor.temperature:.3f}" + ", fitted on the rows held out" * (predictor.temperature != 1)


def _robustness(robustness: Any) -> Rows:
    if not isinstance(robustness, dict) or "mean_accuracy" not in robustness:
        return
    yield "mean accuracy under corruptions", f"{robustness['mean_accuracy']:.2%}"
    for name, row in robustness.get("corruptions", {}).items():
        yield name, f"{row['accuracy']:.2%}"


def _torch(predictor: Predictor) -> str:
    """Returns a line of code that permutes the first kernel to PyTorch's axis order."""
    leaves = jax.tree_util.tree_leaves_with_path(predictor.members[0]["params"])
    for path, leaf in sorted(leaves, key=lambda item: item[1].ndim, reverse=True)[:1]:
        member = "member_0/" * (len(predictor.members) > 1)
        name = member + "params/" + "/".join(str(key.key) for key in path)
        if leaf.ndim == 4:
            return f'kernel = weights["{name}"].permute(3, 2, 0, 1)  # rows, columns, in, out -> out, in, rows, columns'
        return f'kernel = weights["{name}"].T  # in, out -> out, in'
    return ""
