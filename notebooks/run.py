"""Runs the notebooks from top to bottom: do they still work, and what comes out?

    python notebooks/run.py [NAME ...]             all of them, or these
    python notebooks/run.py [NAME ...] --write     and puts the outputs into the files, as they are committed

They run in one folder that is gone afterwards, in the order of NAMES: what quickstart trains, the others find there.
VMOD_NOTEBOOK_QUICK=1 has them train for a few steps only.
"""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NAMES = ("quickstart", "routing_study", "bring_weights", "export_to_pytorch")


def run(name: str, folder: Path) -> nbformat.NotebookNode:
    """Executes notebooks/NAME.ipynb with `folder` as its working directory; -> the notebook with its outputs.

    Raises nbclient's CellExecutionError, which shows the cell and its traceback.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    metadata = dict(notebook.metadata)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, resources=where, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = nbformat.from_dict(metadata)  # without the versions of this machine
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--write", action="store_true", help="put the outputs into the files")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"no notebook {', '.join(unknown)}: use {', '.join(NAMES)}")
    if args.write and os.environ.get("VMOD_NOTEBOOK_QUICK") == "1":
        parser.error("--write with VMOD_NOTEBOOK_QUICK=1: the outputs would be those of models that learned nothing")
    os.environ["PYTHONWARNINGS"] = "ignore"  # they come with paths of this machine, and tell readers nothing
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in NAMES if name in args.names or not args.names]:
            notebook = run(name, Path(folder))
            print(f"{name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran", flush=True)
            if args.write:
                nbformat.write(notebook, HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
