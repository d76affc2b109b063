"""Notebooks run, and each .ipynb is the pair of its .py."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_claims_hold(path, tmp_path):
    others = {
        name: value for name, value in os.environ.items() if name not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    }
    environment = {**others, "MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"}  # compiled as a reader has it
    run = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.fast
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_paired_notebook_has_the_same_cells_and_was_executed(path):
    script, paired = (jupytext.read(p) for p in (path, path.with_suffix(".ipynb")))
    assert [c.source for c in script.cells] == [c.source for c in paired.cells]
    assert any(c.get("outputs") for c in paired.cells)
