"""A test-only extension: teaches a WebUI the shape of the embedded model, so that its exported checkpoint loads.

Link or copy the folder tiny_shape into the WebUI's extensions; tests/live/checkpoint.py makes the checkpoint.
"""

import importlib.util
import os
import sys
from importlib.util import find_spec

_LIB = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "lib")


def _has(name):
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _names():
    """What this WebUI needs: A1111 builds a model from the .yaml beside it, the others have loaders of their own."""
    if _has("backend.patcher.unet"):
        return "tiny_shapes", "tiny_forge", "tiny_units"
    if _has("ldm_patched") and _has("modules_forge"):
        return "tiny_shapes", "tiny_reforge", "tiny_units"
    return "tiny_shapes", "tiny_units"


for _name in _names():
    if _name not in sys.modules:  # where it stays: the WebUI puts sys.path back after each script
        _spec = importlib.util.spec_from_file_location(_name, os.path.join(_LIB, _name + ".py"))
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])

if _has("modules_forge"):
    sys.modules["tiny_units"].for_forge()
elif "scripts.controlnet_model_guess" in sys.modules:
    sys.modules["tiny_units"].for_a1111()
