"""Exports every preset and family in every format, and reports the largest differences from the network.

    python scripts/check_exports.py [--networks=default,resnet] [--onnxruntime_web=DIR]
    python scripts/check_exports.py --workdir=runs/default      # a trained run or population instead

The weights are the initial ones with some noise, so that no bias, mean or variance is 0 or 1; `committee` is two
networks of `tiny`. Each figure is the largest difference of any logit or probability over 1,000 test images, except
`logit`, the largest absolute logit. With `--onnxruntime_web`, a folder in which `npm install onnxruntime-web` was run,
node also runs each ONNX file in onnxruntime-web (WebAssembly), and the logits are compared. Prints one JSON line. Fails
if a network cannot be exported to a format, or if its file differs too much.
"""

import functools
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from mnist_flax import cli, preset, rng
from mnist_flax.analysis.evaluation import Predictor, load_predictor, make_predictor, predict_logits
from mnist_flax.checks import nearest
from mnist_flax.config import Config, replace
from mnist_flax.data.load import load_splits
from mnist_flax.errors import ConfigError
from mnist_flax.exporting.formats import FORMATS, NUM_IMAGES, check_outputs
from mnist_flax.exporting.inference import in_float32
from mnist_flax.models import MODELS
from mnist_flax.run.provenance import provenance
from mnist_flax.sections import DataConfig
from mnist_flax.step import init_state

# Batches of 333 images, so that the last batch has another size.
NODE = """
const [model, images, logits] = process.argv.slice(1);
const fs = require("fs");
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;
(async () => {
  const session = await ort.InferenceSession.create(fs.readFileSync(model), { executionProviders: ["wasm"] });
  const pixels = new Uint8Array(fs.readFileSync(images));
  const parts = [];
  for (let start = 0; start < pixels.length; start += 333 * 784) {
    const batch = pixels.subarray(start, start + 333 * 784);
    const tensor = new ort.Tensor("uint8", batch, [batch.length / 784, 28, 28, 1]);
    const results = await session.run({ images: tensor }, ["logits"]);
    parts.push(Buffer.from(results.logits.data.slice().buffer));
  }
  fs.writeFileSync(logits, Buffer.concat(parts));
})();
"""


def networks() -> dict[str, list[Config]]:
    """Returns the members' configs of every network, by name: presets, families that no preset uses, a committee."""
    configs = {path.stem: preset.load_config(path) for path in sorted(preset.FOLDER.glob("*.py"))}
    used = {type(config.model) for config in configs.values()}
    configs |= {name: Config(model=family()) for name, family in MODELS.items() if family not in used}
    committee = [replace(configs["tiny"], seed=seed) for seed in (0, 1)]
    return {name: [config] for name, config in configs.items()} | {"committee": committee}


def with_noise(members: Sequence[Config]) -> Predictor:
    """Returns a predictor with noisy initial weights, and a temperature."""
    variables = []
    for config in members:
        random = np.random.default_rng(config.seed)
        state = jax.jit(init_state, static_argnums=0)(config.program, rng.root_key(config.seed))
        params, stats = (
            jax.tree.map(lambda leaf, noise=noise: leaf + noise(size=leaf.shape).astype(leaf.dtype), tree)
            for tree, noise in (
                (state.params, functools.partial(random.normal, 0, 0.03)),
                (state.batch_stats, functools.partial(random.uniform, 0, 0.5)),  # variances stay positive
            )
        )
        variables.append({"params": params, "batch_stats": stats})
    return make_predictor(members[0], *variables, temperature=0.5)


def differences(predictor: Predictor, images: np.ndarray, web: str) -> dict[str, float]:
    """Writes a predictor in each format; returns each file's largest difference from it, and the largest logit."""
    logits = predict_logits(in_float32(predictor), images)
    found = {"logit": float(np.abs(logits).max())}
    for name, chosen in FORMATS.items():
        contents = chosen.write(predictor, {})
        found[name] = check_outputs(name, contents, predictor, images)
        if name == "onnx" and web:
            in_web = run_in_node(contents[".onnx"], images, web).reshape(logits.shape)
            found["onnxruntime_web"] = float(np.abs(in_web - logits).max())
    return {key: float(f"{value:.2g}") for key, value in found.items()}


def run_in_node(model: bytes, images: np.ndarray, web: str) -> np.ndarray:
    """Runs an ONNX file in onnxruntime-web, installed in the folder `web`; returns the flattened logits."""
    with tempfile.TemporaryDirectory() as folder:
        names = [pathlib.Path(folder, name) for name in ("model.onnx", "images", "logits")]
        names[0].write_bytes(model)
        names[1].write_bytes(images.tobytes())
        subprocess.run(["node", "-e", NODE, "--", *map(str, names)], cwd=web, check=True)
        return np.fromfile(names[2], np.float32)


def versions(web: str) -> dict[str, str]:
    """Returns the versions of the packages that write and run the files."""
    found = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "jax", "numpy")}
    if web:
        package = pathlib.Path(web, "node_modules", "onnxruntime-web", "package.json")
        found["onnxruntime-web"] = json.loads(package.read_text())["version"]
    return found


def main(argv: Sequence[str]) -> None:
    """Checks the networks that the flags name."""
    del argv
    values = flags.FLAGS
    images = load_splits(DataConfig(on_missing="error")).test.image[:NUM_IMAGES]
    if values.workdir:
        workdir = pathlib.Path(values.workdir)
        chosen = {workdir.absolute().name: load_predictor(workdir)[0]}
    else:
        known = networks()
        for name in set(values.networks or ()) - known.keys():
            raise ConfigError(f"--networks={name}: {nearest(name, known)}")
        chosen = {name: with_noise(known[name]) for name in values.networks or known}
    found = {}
    for name, predictor in chosen.items():
        found[name] = differences(predictor, images, values.onnxruntime_web)
        print(f"{name}: {found[name]}", file=sys.stderr)
    result = {"networks": found, **provenance()}
    result["versions"] |= versions(values.onnxruntime_web)
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a trained run or population to check instead")
    flags.DEFINE_list("networks", [], "names of presets and families; default: all, and a committee")
    flags.DEFINE_string("onnxruntime_web", "", "a folder in which npm installed onnxruntime-web")
    cli.run(main)
