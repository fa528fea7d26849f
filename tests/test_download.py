"""Downloads from a local server that works, or fails as real servers do."""

import contextlib
import functools
import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from idx_files import (
    Published,
)

from mnist_flax.data import download
from mnist_flax.errors import DataError


@contextlib.contextmanager
def served(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler]) -> Iterator[str]:
    """Serves a folder on this machine, and yields its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HalfHandler(Handler):
    """Announces the whole file, sends half of it and hangs up."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2])


class ScrambledHandler(Handler):
    """Sends the right number of bytes, one of them wrong."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = bytearray(source.read())
        content[-20] ^= 1
        outputfile.write(content)


@pytest.mark.parametrize("name", ["mnist", "emnist/letters"])
def test_download_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_messages: list[str], name: str) -> None:
    small = Published(tmp_path, monkeypatch, name)
    with served(small.raw_dir, Handler) as url:
        small.at(url)
        small.check(small.load(), "download")
    assert any(f"downloading {url}" in message for message in data_messages)
    shutil.rmtree(small.copy)
    small.check(small.load(), "download")  # from the downloaded files: the server is gone


def test_interrupted_download_counts_as_unreachable(small: Published) -> None:
    with served(small.raw_dir, HalfHandler) as url:
        small.at(url)
        assert small.load().name == "digits"
        with pytest.raises(DataError, match="cannot be downloaded: there is no connection to its server, or it"):
            small.load(source="download")
    assert not small.data_dir.exists()


@pytest.mark.parametrize("source", ["auto", "download"])
def test_wrong_download_is_an_error(small: Published, source: str) -> None:
    with served(small.raw_dir, ScrambledHandler) as url:
        small.at(url)
        with pytest.raises(DataError, match=r"does not send the official file: .*SHA-256"):
            small.load(source=source)
    assert not small.data_dir.exists()


def test_download_reads_no_more_than_it_should(small: Published) -> None:
    path = small.raw_dir / "train-images-idx3-ubyte.gz"
    with served(small.raw_dir, Handler) as url:
        small.at(url)
        path.write_bytes(path.read_bytes() + bytes(1 << 20))
        with pytest.raises(DataError, match="sends more than"):
            small.load(source="download")
    assert not small.data_dir.exists()


def test_missing_page_is_an_error(small: Published, tmp_path: Path) -> None:
    with served(tmp_path, Handler) as url:
        small.at(url)
        with pytest.raises(DataError, match="404"):
            small.load(source="download")


def test_silent_host_times_out(small: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(download.TIMEOUTS) < 30
    monkeypatch.setattr(download, "TIMEOUTS", (0.2, 0.2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        small.at(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(DataError, match=r"(?s)cannot be downloaded: .*timed out.*MNIST_FLAX_RAW_DIR"):
            small.load(source="download")
