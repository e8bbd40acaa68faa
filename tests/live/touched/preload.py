"""A test-only extension: records what AccDiffusion touches in this WebUI (tests/contract/touched.py).

Link the folder into the WebUI's extensions, and start the WebUI with ACCDIFF_TOUCHED=FILE.json; the file is written
every few seconds.
"""

import importlib
import os
import sys
from pathlib import Path

if os.environ.get("ACCDIFF_TOUCHED"):  # before any script is loaded
    _root = str(Path(os.path.realpath(__file__)).parents[3])
    sys.path.insert(0, _root)
    try:
        importlib.import_module("tests.contract.touched").keep_writing(Path(os.environ["ACCDIFF_TOUCHED"]))
    finally:
        sys.path.remove(_root)
