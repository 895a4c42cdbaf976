"""The notebook's cells run as they stand, and their outputs can be read without."""

import json
import pathlib

import matplotlib
import pytest
from matplotlib import pyplot

PATH = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run_in_order(monkeypatch, capsys):
    matplotlib.use("agg")
    drawn = []
    monkeypatch.setattr(pyplot, "show", lambda: drawn.append(pyplot.gcf()))
    names = {}
    for number, cell in enumerate(CELLS):
        source = "".join(cell["source"])
        exec(compile(source, f"quickstart.ipynb[{number}]", "exec"), names)
    pyplot.close("all")
    assert len(drawn) == 2
    assert "num_kv_heads=5" in capsys.readouterr().out
    assert names["kept"][1][1] < names["without"][1][1] / 2  # tokens prefilled
    assert names["kept"][1][0] == names["without"][1][0]  # the same text


@pytest.mark.parametrize("cell", CELLS[1:], ids=lambda cell: cell["id"])
def test_a_cell_has_an_output_and_no_error(cell):
    kinds = {output["output_type"] for output in cell["outputs"]}
    assert kinds
    assert "error" not in kinds
    told = [o["text"] for o in cell["outputs"] if o.get("name") == "stderr"]
    assert not told


def test_it_is_small_and_names_no_machine():
    assert PATH.stat().st_size < 300_000
    text = PATH.read_text()
    assert "/root" not in text
    assert "/home" not in text
