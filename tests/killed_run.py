"""Trains a run that kills itself at a chosen moment, so that no handler and no `finally` runs.

python tests/killed_run.py CONFIG.json WORKDIR MOMENT
"""

import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from mnist_flax import members, train
from mnist_flax.config import Config
from mnist_flax.run import log as logs
from mnist_flax.run import store
from mnist_flax.run import workdir as workdirs


def die(*_: Any, **__: Any) -> Any:
    """Ends this process like a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


def instead(owner: Any, name: str, replacement: Callable[..., Any], *, calls: int = 1) -> None:
    """Replaces a function from its call number `calls` on; earlier calls still reach the old function."""
    old, count = getattr(owner, name), iter(range(1, 10**6))
    setattr(owner, name, lambda *a, **k: replacement(*a, **k) if next(count) >= calls else old(*a, **k))


def half_a_line(path: pathlib.Path, content: bytes) -> None:
    """Writes half of a line, and dies."""
    with path.open("ab") as file:
        file.write(content[: len(content) // 2])
    die()


def half_a_folder(path: pathlib.Path, **_: Any) -> None:
    """Deletes the files of a checkpoint's state, and dies."""
    for file in (path / "state").rglob("*"):
        if file.is_file():
            file.unlink()
    die()


def orbax_writing() -> None:
    """Dies when Orbax has written some of its files."""
    import orbax.checkpoint as ocp

    instead(ocp.JsonCheckpointHandler, "finalize", die, calls=2)


def after(owner: Any, name: str) -> None:
    """Dies right after a function has returned."""
    old = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (old(*a, **k), die()))


MOMENTS: dict[str, Callable[[], None]] = {
    "while it claims its folder": lambda: instead(workdirs, "write_text", die),
    "before its first file": lambda: instead(workdirs, "write_text", die, calls=2),
    "before its first checkpoint": lambda: instead(logs.RunLog, "steps", die, calls=2),
    "while Orbax writes": orbax_writing,
    "between a save and its rename": lambda: instead(workdirs, "sync", die, calls=20),
    "after the rename": lambda: instead(store.Store, "_prune", die, calls=2),
    "while an old checkpoint is deleted": lambda: instead(shutil, "rmtree", half_a_folder),
    "while a line is written": lambda: instead(workdirs, "append_bytes", half_a_line, calls=10),
    "while it evaluates": lambda: instead(train, "evaluate_holdout", die, calls=2),
    "before it reads the test set": lambda: instead(train, "finish", die),
    "before its weights": lambda: instead(members, "save_weights", die),
    "before its summary": lambda: instead(members, "provenance", die),
}
MOMENTS_OF_A_REPORT: dict[str, Callable[[], None]] = {
    "before its report": lambda: instead(members, "write_report", die),
    "after its report": lambda: after(members, "write_report"),
}

if __name__ == "__main__":
    (MOMENTS | MOMENTS_OF_A_REPORT)[sys.argv[3]]()
    train.fit(Config.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text())), pathlib.Path(sys.argv[2]))
