"""notebooks/sacl.ipynb: kept outputs are those of a clean run, and its cells run as they are."""

import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "sacl.ipynb"
TINY = """
import shapes

# the demo estimates the hours of the paper's run by two steps of its network, here of one block
sacl.SEResNet.BLOCKS["resnet50"] = (sacl.Bottleneck, (1, 0, 0, 0))

draw = shapes.draw
shapes.draw = lambda count, part, seed: draw(count // 100, part, seed)
SETTINGS = dict(dataset="shapes", width=8, dim=16, epochs=1, knn_every=1, batch_size=16)
SETTINGS["output_dir"], FOLDER = {out!r} + "/run", {out!r} + "/images"
"""


def test_the_notebook_keeps_the_outputs_of_one_clean_run():
    text = PATH.read_text()
    assert len(text) < 2e6
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5


def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(PATH, as_version=4)
    settings = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    settings.source = TINY.format(out=str(tmp_path))
    resources = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert (tmp_path / "run" / "backbone.pth").exists()
    assert (tmp_path / "run-own" / "names.txt").read_text().startswith("drawn-00.png")
