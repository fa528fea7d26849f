"""The scripts: train, test and the benchmarks."""

import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from types import ModuleType

import forked
import pytest
import small_population
from small_run import config_file

from mnist_flax import preset
from mnist_flax.config import Config, replace
from mnist_flax.errors import ConfigError, UserError
from mnist_flax.train import fit

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
MEASUREMENTS = [name for name in SCRIPTS if name.startswith(("bench_", "torture"))]

# A recipe that the other frameworks can follow, on the embedded digits.
SMALL = replace(
    Config(),
    data__name="digits",
    data__num_train=300,
    data__holdout=20,
    model__init="he_normal",
    augment__shift=1,
    optimizer__name="adamw",
    optimizer__weight_decay=1e-4,
    optimizer__schedule="one_cycle",
    optimizer__learning_rate=4e-3,
    train__epochs=3,
    train__label_smoothing=0.05,
    train__report=False,
    train__demo=False,
)
QUICK = replace(SMALL, model__widths=(8,), model__pools=(2,), eval__batch_size=120)


def script(name: str) -> ModuleType:
    """Loads a script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurement_says_what_it_measures(name: str) -> None:
    result = forked.run(f"scripts/{name}", "--help")
    assert result.returncode == 0, result.stderr
    assert f"scripts/{name}:" in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_listed(name: str) -> None:
    assert f"`{name}`" in (ROOT / "scripts" / "README.md").read_text()


@pytest.mark.parametrize("name", ["train", "test"])
def test_an_unsuitable_interpreter_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for interpreter in (str(old), "no-such-python"):
        environment = {**os.environ, "PYTHON": interpreter}
        command = [str(ROOT / "scripts" / name)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2
        assert f"PYTHON={interpreter}: must be Python 3.11 to 3.13" in result.stderr


def test_train_says_which_folder_its_paths_are_relative_to(tmp_path: pathlib.Path) -> None:
    checkout, python = tmp_path / "checkout", tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.12\n")
    environment = checkout / ".venv" / "3.12"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text("#!/bin/sh\npwd\n")
    for path in (python, environment / "bin" / "python"):
        path.chmod(0o755)
    for name in ("requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (checkout / name).touch()
    (environment / "complete").write_text(f"3.12 {checkout} requirements.lock 4294967295 0")  # the sum of no bytes
    (checkout / "scripts").mkdir()
    for name in ("train", "environment.sh"):
        shutil.copy(ROOT / "scripts" / name, checkout / "scripts")
    command = [str(checkout / "scripts" / "train"), "--workdir=here"]
    result = subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    expected = f"cd {checkout} && python -m mnist_flax.main --config=configs/default.py --workdir=here\n"
    assert (result.stdout.splitlines()[-1], result.stderr) == (str(checkout), expected)
    for page in ("README.md", "scripts/README.md"):
        assert "relative to the checkout" in " ".join((ROOT / page).read_text().split())


def test_training_flops_equal_values_by_hand() -> None:
    module = script("bench_steps")
    first, second = 2 * 26**2 * 9 * 1 * 32, 2 * 11**2 * 9 * 32 * 64
    forward = first + second + 2 * 3**2 * 9 * 64 * 64 + 2 * 576 * 64 + 2 * 64 * 10
    assert module.training_flops(Config()) == 3 * forward - first
    perceptron = replace(Config(), model__widths=(), model__pools=(1,), model__dense=(5,))
    assert module.training_flops(perceptron) == 2 * (784 * 5 * 2 + 5 * 10 * 3)


@pytest.mark.slow
def test_ours_and_a_peer_train_the_same_recipe_in_turns(tmp_path: pathlib.Path) -> None:
    bench_peers = script("bench_peers")
    bench_peers.check(SMALL)
    data = tmp_path / "data.npz"
    bench_peers.write_data(SMALL, data)
    commands = {"ours": bench_peers.command("ours", SMALL, data)}
    # Flax is installed here; the other frameworks need their own environments.
    commands["flax"] = [argument.replace("peers.ours", "peers.flax") for argument in commands["ours"]]
    result = bench_peers.bench(SMALL, commands, repeats=2, whole=False)
    assert result["best_peer"] == "flax"
    for name, program in result["programs"].items():
        assert program["test_accuracy"] > 0.5, f"{name} does not learn"
        assert len(program["seconds"]) == 2
        assert program["versions"]["flax"]
    ours, flax = (result["programs"][name]["seconds"] for name in ("ours", "flax"))
    low, high = result["programs"]["flax"]["ratio_range"]
    assert low <= ours[1] / flax[1] + 0.01
    assert high >= ours[1] / flax[1] - 0.01


def test_a_peer_that_fails_is_reported(tmp_path: pathlib.Path) -> None:
    bench_peers = script("bench_peers")
    commands = {"ours": bench_peers.command("ours", SMALL, tmp_path / "missing.npz")}
    with pytest.raises(UserError, match=r"scripts\.peers\.ours failed:(.|\n)*missing\.npz"):
        bench_peers.bench(SMALL, commands, repeats=1, whole=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__widths": (8, 16, 16)}, r"config\.model\.widths = \(8, 16, 16\): flax knows only \(32, 64, 64\)"),
        ({"optimizer__name": "sgd"}, "config.optimizer.name = 'sgd': the peers know only adam and adamw"),
        ({"augment__rotate": 5.0}, r"config\.augment\.rotate = 5\.0: keras knows only 0\.0"),
        (
            {"model__kernel_sizes": (4,), "model__paddings": ("SAME",)},
            r"kernel_sizes = \(4,\): the peers need odd sizes",
        ),
    ],
)
def test_a_recipe_that_the_peers_cannot_follow_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script("bench_peers").check(replace(SMALL, **fields))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench_peers --config=tiny --peers=", "--peers: is empty; name some of "),
        ("bench_peers --config=tiny --peers=kerass", "--peers=kerass: did you mean 'keras'?"),
        ("study_presets --jobs={folder}/jobs --output={folder}/results", "line 1 is not a JSON object"),
        ("study_views --workdir={folder}/run", "the run held out no rows; name one with config.data.holdout"),
        ("bench_predict --workdir={folder}/nowhere", "nowhere: "),
    ],
)
def test_a_mistake_gets_one_message(command: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "jobs").write_text("not JSON\n")
    if command.startswith("study_views"):
        fit(replace(QUICK, data__holdout=0, train__epochs=1), tmp_path / "run")
    name, *arguments = command.format(folder=tmp_path).split()
    result = forked.run(f"scripts/{name}.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_peers_follow_any_seed() -> None:
    script("bench_peers").check(replace(SMALL, seed=1))


def test_the_peers_can_follow_the_documented_commands() -> None:
    bench_peers = script("bench_peers")
    page = (ROOT / "docs" / "speed.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("python scripts/bench_peers.py")]
    assert len(commands) == 3
    for command in commands:
        overrides = [word.removeprefix("--config.") for word in command if word.startswith("--config.")]
        given = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
        config = preset.load_config(ROOT / given["config"], overrides)
        bench_peers.check(config, given["peers"].split(",") if "peers" in given else tuple(bench_peers.PEERS))


@pytest.mark.slow
def test_the_seconds_of_a_start_add_up(tmp_path: pathlib.Path) -> None:
    path = config_file(SMALL, tmp_path / "config.py")
    cold, warm = script("bench_startup").bench(str(path), repeats=1)
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    for result in (cold, warm):
        parts = dict(result["seconds_median"])
        assert min(parts.values()) > 0
        assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=0.01)


def test_a_start_that_fails_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"failed before its first step:(.|\n)*nowhere\.py: cannot be read"):
        script("bench_startup").start("nowhere.py", str(tmp_path))


@pytest.mark.slow
def test_a_whole_run_is_measured() -> None:
    result = script("bench_process").bench(QUICK, repeats=1)
    assert 0 < result["train_seconds_median"] < result["seconds_median"]
    assert 50 < result["peak_mib_median"] < 10_000
    assert result["test_accuracy"][0] > 0.5


def test_inference_is_measured() -> None:
    result = script("bench_inference").bench(QUICK, batch_sizes=[16], repeats=1, latencies=3)
    assert 0 < result["one_image"]["p50_ms"] <= result["one_image"]["p99_ms"]
    assert 0 < result["picture"]["p50_ms"] <= result["picture"]["p99_ms"]
    assert result["images_per_second"][16] > 0
    assert result["evaluate_seconds_median"] == result["evaluate_seconds"][0] > 0


def test_a_preset_over_seeds_has_its_interval_and_counts_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_presets = script("bench_presets")
    monkeypatch.setattr(preset, "load_config", lambda *_: replace(QUICK, train__epochs=1))
    result = bench_presets.bench("tiny", [3, 4], target=1.0)
    low, high = result["accuracy_interval"]
    assert low < min(result["accuracies"]) < result["accuracy_mean"] < max(result["accuracies"]) < high
    assert result["reached"] == 0
    assert bench_presets.statistics_of("x", [2.0]) == {"x_mean": 2.0, "x_sd": None, "x_interval": None}


@pytest.mark.slow
def test_the_accelerator_benchmark_runs_on_cpu_devices(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_accelerator.py"), "--config=configs/tiny.py"]
    command += [
        "--images=64",
        "--batch_sizes=16",
        "--devices=2,1",
        "--dtypes=float32",
        "--drivers=scan",
        "--members=2",
        "--repeats=1",
    ]
    command += [f"--picture={tmp_path / 'picture.png'}", f"--profile={tmp_path / 'trace'}"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = [(line["kind"], line["num_devices"], line["members_per_device"]) for line in lines]
    assert found == [("scan", 1, 1), ("scan", 2, 1), ("members", 1, 2), ("members", 2, 2)]
    for line in lines:
        assert line["images_per_second_median"] > 0
        assert line["flop_utilisation"] > 0
        assert (line["scaling_efficiency"] == 1) == (line["num_devices"] == 1)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_scored_seeds_agree_with_their_population(tmp_path: pathlib.Path) -> None:
    members = small_population.seeds() / "members"
    done = forked.run("scripts/score_seeds.py", f"--runs={members}/seed-*", "--committee=2")
    assert done.returncode == 0, done.stderr
    found, population = json.loads(done.stdout), json.loads((members.parent / "population.json").read_text())
    assert [row["accuracy"] for row in found["runs"]] == [member["accuracy"] for member in population["members"]]
    assert found["accuracy"]["mean"] == pytest.approx(population["mean"]["accuracy"])
    assert [committee["members"] for committee in found["committees"]] == [
        ["seed-3", "seed-4", "seed-5"],
        ["seed-3", "seed-4"],
    ]
    refused = forked.run("scripts/score_seeds.py", f"--runs={members}/seed-*", "--committee=4")
    assert (refused.returncode, "--committee=4: there are only 3 runs" in refused.stderr) == (2, True)
    (tmp_path / "seed-9").mkdir()
    refused = forked.run("scripts/score_seeds.py", f"--runs={tmp_path}/seed-*")
    assert (refused.returncode, "holds no checkpoints/ of a run" in refused.stderr) == (2, True)
    refused = forked.run("scripts/score_seeds.py", f"--runs={tmp_path}/other-*")
    assert f"--runs={tmp_path}/other-*: matches no folder" in refused.stderr
