"""The notebook: every cell runs on scikit-learn's digits, and its outputs are saved."""

import json
import pathlib
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "notebooks" / "mnist_cnn.ipynb"


def test_notebook_runs_from_top_to_bottom(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    kernel = tmp_path / "kernels" / "python3" / "kernel.json"  # a kernel that is this interpreter
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("NOTEBOOK_DATASET", "digits")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "digits: 1,437 training images" in text
    assert "test accuracy 9" in text


def test_notebook_is_saved_with_its_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= 10
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
