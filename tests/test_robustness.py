"""Robustness of a run and of a committee: scores, published arrays, comparison, non-digits, and the verb."""

import dataclasses
import json
import pathlib
import shutil
import subprocess

import forked
import numpy as np
import pytest
import small_population
from sklearn.metrics import accuracy_score, log_loss

from mnist_flax.analysis import novelty, robustness
from mnist_flax.analysis.corruptions import CORRUPTIONS
from mnist_flax.analysis.evaluation import load_predictor
from mnist_flax.data.load import load_splits
from mnist_flax.data.splits import Examples
from mnist_flax.errors import DataError, WorkdirError
from mnist_flax.metrics import log_probabilities
from mnist_flax.sections import DataConfig


@pytest.fixture(scope="module")
def test() -> Examples:
    return load_splits(small_population.CONFIG.data).test


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run("-m", "mnist_flax.robustness", *map(str, arguments))


def test_interval_of_a_few_images_stays_between_0_and_1() -> None:
    label = np.array([1, 1, 1, 1], np.int32)
    images = {name: np.zeros((4, 28, 28, 1), np.uint8) for name in CORRUPTIONS}
    logits = {name: np.eye(10, dtype=np.float32)[label] for name in ["clean", *CORRUPTIONS]}
    for name in list(CORRUPTIONS)[:3]:
        logits[name] = np.eye(10, dtype=np.float32)[[1, 1, 1, 2]]
    facts = robustness.robustness_facts(logits, robustness.Corrupted(images, label, frozenset()))
    assert 0 < facts["mean_accuracy_interval"][0] < facts["mean_accuracy_interval"][1] == 1


def test_scores_are_those_of_scikit_learn(test: Examples) -> None:
    predictor, _ = load_predictor(small_population.seeds())
    corrupted = robustness.corrupt_all(test)
    logits = robustness.predict_all(predictor, test, corrupted)
    facts = robustness.robustness_facts(logits, corrupted)
    assert list(facts["corruptions"]) == list(CORRUPTIONS)
    for name, row in [("clean", facts["clean"]), *facts["corruptions"].items()]:
        probs = np.exp(log_probabilities(logits[name]))
        assert row["accuracy"] == accuracy_score(test.label, probs.argmax(axis=1))
        assert row["loss"] == pytest.approx(log_loss(test.label, probs, labels=range(10)))
        assert row["accuracy_interval"][0] <= row["accuracy"] <= row["accuracy_interval"][1]
    accuracies = {name: row["accuracy"] for name, row in facts["corruptions"].items()}
    assert facts["mean_accuracy"] == pytest.approx(np.mean(list(accuracies.values())))
    affine = ["shear", "scale", "rotate", "translate"]
    assert facts["affine"]["mean_accuracy"] == pytest.approx(np.mean([accuracies.pop(name) for name in affine]))
    assert facts["others"]["mean_accuracy"] == pytest.approx(np.mean(list(accuracies.values())))
    assert facts["mean_accuracy_interval"][0] < facts["mean_accuracy"] < facts["mean_accuracy_interval"][1]


def test_published_arrays_are_used_if_they_are_there(test: Examples, tmp_path: pathlib.Path) -> None:
    images = np.full((len(test.label), 28, 28, 1), 7, np.uint8)
    (tmp_path / "fog").mkdir()
    np.save(tmp_path / "fog" / "test_images.npy", images)
    np.save(tmp_path / "fog" / "test_labels.npy", test.label.astype(np.int64))
    corrupted = robustness.corrupt_all(test, folder=tmp_path)
    assert corrupted.official == {"fog"}
    np.testing.assert_array_equal(corrupted.images["fog"], images)
    assert not robustness.corrupt_all(test, severity=2, folder=tmp_path).official
    np.save(tmp_path / "fog" / "test_labels.npy", test.label[::-1])
    with pytest.raises(DataError, match="does not match the test set"):
        robustness.corrupt_all(test, folder=tmp_path)
    with (tmp_path / "fog" / "test_labels.npy").open("wb") as file:
        np.savez(file, labels=test.label)  # an archive of arrays is no array
    with pytest.raises(DataError, match="cannot be read"):
        robustness.corrupt_all(test, folder=tmp_path)
    (tmp_path / "fog" / "test_labels.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        robustness.corrupt_all(test, folder=tmp_path)


def test_published_arrays_are_looked_for_where_the_data_are(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_FLAX_RAW_DIR", str(tmp_path))
    assert robustness.official_folder(DataConfig()) is None
    (tmp_path / "mnist_c").mkdir()
    assert robustness.official_folder(DataConfig()) == tmp_path / "mnist_c"
    assert robustness.official_folder(DataConfig(name="kmnist")) is None


def test_comparison_finds_the_better_network(test: Examples) -> None:
    label = np.asarray(test.label)
    good = {name: np.eye(10)[label] for name in CORRUPTIONS}
    bad = {name: np.eye(10)[np.where(np.arange(len(label)) < 100, 0, label)] for name in CORRUPTIONS}
    result = robustness.compare_robustness(bad, good, label)
    assert result["verdict"] == "b"
    wrong = int(np.sum(label[:100] != 0))
    assert result["difference"] == pytest.approx(wrong / len(label))
    assert result["corruptions"]["fog"]["only_b_right"] == wrong
    assert robustness.compare_robustness(good, bad, label)["verdict"] == "a"
    assert robustness.compare_robustness(good, good, label)["verdict"] is None


def test_detection_on_a_hand_made_case() -> None:
    digits, others = np.arange(100.0), np.array([200.0, 50.5, 96.5])
    result = novelty.detection_scores(digits, others)
    assert result["auroc"] == pytest.approx((100 + 51 + 97) / 300)
    assert result["fpr95"] == pytest.approx(1 / 3)  # the threshold is 95, and only 50.5 lies below it


def test_strangers_have_five_kinds_and_are_the_same_every_time(test: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_FLAX_RAW_DIR", raising=False)
    monkeypatch.setattr(novelty, "_fashion", lambda data: None)
    first, second = (novelty.non_digits(test, small_population.CONFIG.data) for _ in range(2))
    assert list(first) == ["uniform_noise", "smooth_noise", "rotated_digits", "cut_digits", "letters"]
    for kind, pictures in first.items():
        np.testing.assert_array_equal(pictures, second[kind])
        assert pictures.shape[1:] == (28, 28, 1)
        assert pictures.dtype == np.uint8
        assert (pictures.max(axis=(1, 2, 3)) > 0).mean() > 0.95
    assert len(first["letters"]) == len(novelty.LETTERS) * len(novelty.FONTS) * 5


def test_other_classes_than_digits_have_no_rotated_digits_and_letters(test: Examples) -> None:
    kinds = novelty.non_digits(test, DataConfig(name="fashion_mnist"))
    assert list(kinds) == ["uniform_noise", "smooth_noise", "cut_digits"]


def test_missing_fashion_mnist_is_skipped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_FLAX_RAW_DIR", raising=False)
    assert novelty._fashion(DataConfig(data_dir=str(tmp_path))) is None


def test_doubt_is_measured_for_a_committee_and_a_single_run(test: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novelty, "_fashion", lambda data: None)
    predictor, info = load_predictor(small_population.seeds())
    facts = novelty.novelty_facts(predictor, test, test, novelty.non_digits(test, info.config.data))
    assert set(facts["scores"]) == {"doubt", "max_probability", "energy", "disagreement"}
    for of in facts["scores"].values():
        assert of["false_alarms"] == pytest.approx(0.01, abs=0.006)
    single, _ = load_predictor(small_population.seeds() / "members" / "seed-3")
    alone = novelty.novelty_facts(single, test, None, {"halves": np.asarray(test.image)[:, ::-1]})
    assert set(alone["scores"]) == {"doubt", "max_probability", "energy"}
    assert alone["scores"]["energy"]["threshold"] is None


def test_energy_does_not_depend_on_views(test: Examples) -> None:
    predictor, _ = load_predictor(small_population.seeds())
    images = np.asarray(test.image)[:50]
    one, five = (novelty.doubt_scores(dataclasses.replace(predictor, views=views), images) for views in (1, 5))
    np.testing.assert_array_equal(one["energy"], five["energy"])
    assert one["energy"].std() > 0.01
    assert np.abs(one["max_probability"] - five["max_probability"]).max() > 0


def test_the_command_writes_facts_and_a_page_for_folds_too(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(small_population.folds(), tmp_path / "folds")
    done = command(
        f"--workdir={workdir}", f"--compare={small_population.seeds()}", f"--output={tmp_path / 'out'}", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert json.loads(done.stdout) == facts
    assert facts["members"] == 3
    assert facts["severity"] == "published"
    assert facts["labels"]["examples"] == 220
    assert facts["compare"]["interval"][0] < facts["compare"]["difference"] < facts["compare"]["interval"][1]
    page = (tmp_path / "out" / "robustness.html").read_text()
    assert page.count("data:image/png") >= 15 * 5 + len(facts["labels"]["listed"][:40])
    assert f"A is {facts['workdir']}, B is {small_population.seeds().name}:" in page
    assert str(small_population.seeds().parent) not in page  # nobody else's business
    table = robustness.robustness_table(facts).splitlines()
    ends = {line.index("p = ") for line in table if "p = " in line}
    assert len(ends) == 1  # one column, whether a corruption is affine or not
    assert "http" not in page
    assert not (workdir / "robustness.json").exists()


def test_results_of_another_severity_or_dataset_do_not_replace_the_published_ones(tmp_path: pathlib.Path) -> None:
    facts = {"severity": "published", "checkpoint": "latest", "dataset": "emnist/digits", "trained_on": "emnist/digits"}
    changes: tuple[dict[str, object], ...] = (
        {},
        {"severity": 2},
        {"trained_on": "mnist"},
        {"severity": 2, "checkpoint": "best", "trained_on": "mnist"},
    )
    for change in changes:
        outcome = robustness.Outcome(facts | change, None, None, {})  # type: ignore[arg-type]  # only the facts are read
        robustness.save_robustness(outcome, "", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "robustness-emnist-digits.json",
        "robustness-severity2-best-emnist-digits.json",
        "robustness-severity2.json",
        "robustness.json",
    ]
    assert json.loads((tmp_path / "robustness.json").read_text()) == facts
    assert len(list(tmp_path.glob("*.html"))) == len(changes)


def test_a_single_test_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    population = small_population.seeds()
    _, info = load_predictor(population)
    splits = load_splits(info.config.data)
    single = splits._replace(test=splits.test.select(np.array([0])))
    monkeypatch.setattr(robustness, "load_data", lambda *_: (info.config.data, single))
    with pytest.raises(DataError, match="digits: has a single test image"):
        robustness.robustness_of_workdir(population)


def test_p_values_too_small_for_a_number_are_no_zeros() -> None:
    row = {"accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "loss": 1.0, "ece": 0.1, "affine": False}
    mean = {"mean_accuracy": 0.5, "mean_accuracy_interval": [0.4, 0.6], "mean_loss": 1.0, "mean_ece": 0.1}
    test = {"p": 0.0, "only_a_right": 100, "only_b_right": 3000}
    facts = {
        **{"dataset": "mnist", "examples": 10_000, "severity": "published", "clean": row, "corruptions": {"fog": row}},
        **mean, "affine": mean, "others": mean, "no_digit": {"pictures": {}, "scores": {}},
        "compare": {"with": "b", "corruptions": {"fog": test}, "interval": [0, 1], "difference": 0.5, "verdict": "b"},
    }  # fmt: skip
    assert "p < 1e-300" in robustness.robustness_table(facts)


def test_the_command_refuses_what_makes_no_sense(tmp_path: pathlib.Path) -> None:
    for arguments, message in [
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path}"], "error"),
        (["--severity=6"], "severity"),
        (["--severity=abc", "--help"], "error: flag --severity=abc"),
        (["fog"], "is not a flag"),
        ([f"--workdir={small_population.seeds()}", f"--output={__file__}"], "cannot be written (File exists)"),
    ]:
        done = command(*arguments)
        assert done.returncode
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_folder_without_a_run_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(WorkdirError):
        robustness.robustness_of_workdir(tmp_path)
