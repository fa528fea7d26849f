"""What other commands read from `population.json`, the result of a population."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mnist_flax.errors import WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.schema import NUMBER, mismatches

POPULATION = "population.json"
_MEMBER = re.compile(r"(seed|fold)-\d+")  # the folder of a member
_SCORES = {"accuracy": NUMBER, "loss": NUMBER}
_SPREADS = {"mean": _SCORES, "sd": _SCORES, "interval": {"accuracy": [NUMBER]}}
_RESULT = {  # the schema of `population.json`, as far as other commands read it
    **{"kind": str, "dataset": str, "dataset_fingerprint": str, "config": {}, "steps": int},
    "members": [{"name": str, "seed": int, **_SCORES}],
    **_SPREADS,
    "committee": {**_SCORES, "examples": int},
    "agreement": {"examples_by_members_right": [int], "none_right": [object]},
}
_FOLDS = {
    **_RESULT,
    "members": [{"name": str, "seed": int, "fold": int, **_SCORES}],
    "out_of_fold": {"folds": [_SCORES], "correct": int, "examples": int, **_SPREADS},
}
KINDS = ("seeds", "folds")  # of populations


def member_folders(workdir: pathlib.Path, result: dict[str, Any]) -> list[pathlib.Path]:
    """Returns the folders of a population's members, in the order of `population.json`.

    Raises:
      WorkdirError: the population is unfinished, or its result is damaged.
    """
    if not is_population_result(result):
        raise WorkdirError(
            f"{workdir}: holds a population without a complete {POPULATION}; repeat the training command, which"
            f" writes it at the end, or name a single run, such as {example_member(workdir)}"
        )
    return [workdir / workdirs.MEMBERS / member["name"] for member in result["members"]]


def example_member(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of one member of a population, for a message."""
    names = [name for name in workdirs.names_in(workdir / workdirs.MEMBERS) if _MEMBER.fullmatch(name)]
    return workdir / workdirs.MEMBERS / min(names, default="seed-0")


def is_population_result(result: Mapping[str, Any]) -> bool:
    """Returns whether a JSON object has what other commands read from `population.json`."""
    if any(mismatches(result, _FOLDS if result.get("kind") == "folds" else _RESULT, POPULATION)):
        return False
    members = result["members"]
    counts = result["agreement"]["examples_by_members_right"]
    named = all(_MEMBER.fullmatch(member["name"]) for member in members)
    return bool(members) and named and len(counts) > len(members) and result["kind"] in KINDS
