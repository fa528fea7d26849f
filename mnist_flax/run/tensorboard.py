"""Writes the lines of metrics.jsonl as TensorBoard events."""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mnist_flax.run import workdir as workdirs

_NOT_SHOWN = {"step", "epoch", "split", "examples", "seconds"}  # every other key of a line becomes a curve


class Events:
    """One event file, complete after every line and rewritten when a run is resumed.

    tensorboardX's own writer queues events for a background thread: a killed process loses the last ones, and on a
    full disk it hangs. So only its protocol buffers and checksum are used. The wall time of an event is the
    start time of the process plus the seconds of training since then, so TensorBoard's `relative` axis shows training
    time.
    """

    def __init__(self, workdir: pathlib.Path, records: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Replaces the event files of earlier processes by one with the lines so far; `seconds` were trained."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = workdirs.subfolder(workdir, workdirs.TENSORBOARD)
        now = time.time()
        self._path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        self._origin = now - seconds
        with workdirs.as_workdir_error(folder):
            for old in folder.glob("*tfevents*"):
                old.unlink()
        version = Event(wall_time=self._origin, file_version="brain.Event:2")
        # This makes a running TensorBoard discard what it read from the earlier file.
        start = Event(wall_time=self._origin, step=0, session_log=SessionLog(status=SessionLog.START))
        workdirs.append_bytes(self._path, _frame(version) + _frame(start) + b"".join(map(self._event, records)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl."""
        workdirs.append_bytes(self._path, self._event(record))

    def _event(self, record: Mapping[str, Any]) -> bytes:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        shown = {name: value for name, value in record.items() if name not in _NOT_SHOWN and value is not None}
        values = [Summary.Value(tag=f"{record['split']}/{name}", simple_value=value) for name, value in shown.items()]
        wall_time = self._origin + record["seconds"]
        return _frame(Event(wall_time=wall_time, step=record["step"], summary=Summary(value=values)))


def _frame(event: Any) -> bytes:
    """Frames an event as a TFRecord: length, checksum of the length, data, checksum of the data."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    parts = (struct.pack("<Q", len(data)), data)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
