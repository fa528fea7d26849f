"""A run of one second that uses everything that could break a resume, and functions that compare results of runs."""

import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
from typing import Any

from safetensors.numpy import load_file

from mnist_flax.config import Config, replace
from mnist_flax.run import checkpoint
from mnist_flax.run import workdir as workdirs

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Two epochs on the embedded digits, of seven steps each; the last step of an epoch has only eight rows.
SMALL = replace(
    Config(),
    data__name="digits",
    data__num_train=220,
    data__holdout=20,
    model__widths=(4,),
    model__pools=(2,),
    model__dense=(8,),
    model__batch_norm=True,
    model__dropout=0.2,
    augment__shift=1,
    optimizer__ema_decay=0.9,
    train__batch_size=32,
    train__epochs=2,
    train__log_every_steps=3,
    train__report=False,
    train__demo=False,
    eval__batch_size=120,  # with the default, most of each batch would be padding
)


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl without the seconds; every line must be complete."""
    text = (workdir / workdirs.METRICS).read_text()
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        assert record.pop("seconds") >= 0
    return records


def events(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """Returns step, tag and value of all events, in the order of the files, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import masked_crc32c

    found: list[tuple[int, str, float]] = []
    for path in sorted((workdir / workdirs.TENSORBOARD).iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            content, data = data[12 : 12 + length], data[12 + length :]
            assert struct.unpack("<I", data[:4]) == (masked_crc32c(content),)
            event, data = Event.FromString(content), data[4:]
            if event.session_log.status == SessionLog.START:
                found = [other for other in found if other[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns, by name, everything that must be the same however often a run was interrupted."""
    state = checkpoint.load_run(workdir).state
    return {
        **{name: leaf.tobytes() for name, leaf in checkpoint.leaves(state).items()},
        **{name: array.tobytes() for name, array in load_file(workdir / workdirs.WEIGHTS).items()},
        "lines": lines(workdir),
        "events": events(workdir),
    }


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints, and checks that their folder holds nothing else."""
    found = checkpoint.steps_in(workdir / workdirs.CHECKPOINTS)
    names = sorted(path.name for path in (workdir / workdirs.CHECKPOINTS).iterdir())
    assert names == sorted(map(str, found))
    return found


def summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns summary.json."""
    content: dict[str, Any] = json.loads((workdir / workdirs.SUMMARY).read_text())
    return content


def config_file(config: Config, path: pathlib.Path) -> pathlib.Path:
    """Writes a config as a file for `--config`."""
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.to_dict()})\n"
    )
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """Returns the environment of a child process: it compiles as the tests do and shares their compiled programs."""
    count = "--xla_force_host_platform_device_count="
    flags = re.sub(rf"{count}\d+", f"{count}{devices}", os.environ["XLA_FLAGS"])
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """Starts a process of Python."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment(devices), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def run(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a process of Python to its end."""
    with start(*arguments, devices=devices) as process:
        out, err = process.communicate(timeout=800)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
