"""A test-only extension: records what AccDiffusion touches in this WebUI (tests/contract/touched.py).

Link the folder into the WebUI's extensions, and start the WebUI with ACCDIFF_TOUCHED=FILE.json; the file is written
every few seconds. With ACCDIFF_CHECK=RECORD.json, scripts/touched_check.py says in the log what this WebUI lacks.
"""

import importlib
import os
import sys
from pathlib import Path

_ROOT = str(Path(os.path.realpath(__file__)).parents[3])


def _ours(name):
    sys.path.insert(0, _ROOT)
    try:
        return importlib.import_module(f"tests.contract.{name}")
    finally:
        sys.path.remove(_ROOT)


if os.environ.get("ACCDIFF_TOUCHED"):  # before any script is loaded
    _ours("touched").keep_writing(Path(os.environ["ACCDIFF_TOUCHED"]))
if os.environ.get("ACCDIFF_CHECK"):
    _ours("check")
