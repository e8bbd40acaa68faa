"""Records what a WebUI has of the names that this project's code touches.

    python -m tests.contract.record --webui FOLDER --name a1111

The WebUI is read, not run. What is missing there fails, unless our code only looks whether it is there ("absent").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.contract import order, stand_in
from tests.contract.source import Checkout
from tests.contract.uses import CLASSES, HOSTS, PACKAGES, ROOT, uses

#: In place of a description, where our code can do without the name.
ABSENT = "absent"


def entry(checkout: Checkout, host: str, name: str) -> tuple[str, str] | None:
    """Name (cut off behind what cannot be followed) and description; None where the WebUI lacks it."""
    first, _, attribute = name.partition(".")
    if first in PACKAGES:
        options, _, key = name.rpartition(".")
        if options in ("modules.shared.opts", "modules.shared.cmd_opts") and key in checkout.settings:
            return name, "setting"
        if options == "modules.shared.cmd_opts":
            return None
        found = checkout.find(name)
        return None if found is None else (found[0], checkout.describe(found[1]))
    for each in CLASSES[host].get(first, ()):
        owner = checkout.find(each)
        below = None if owner is None or owner[0] != each else checkout.attribute(owner[1], attribute)
        if below is not None:
            kind = checkout.describe(below)
            return name, f"{kind} of {each.rpartition('.')[2]}" if kind == "value" else kind
    return None


def record(folder: Path, host: str) -> dict[str, Any]:
    """The record of a WebUI's folder. Raises LookupError, naming what is missing."""
    checkout, ours = Checkout(folder), uses(host)
    claimed = stand_in.claimed() if host == "a1111" else set()
    found: dict[str, str] = {}
    missing = []
    for name in sorted({*ours.names, *ours.optional, *claimed}):
        known = entry(checkout, host, name)
        if known is not None:
            found[known[0]] = known[1]
        elif name in ours.optional:
            found[name] = ABSENT
        elif name not in claimed:
            missing.append(name)
    if missing:
        raise LookupError("\n".join(missing))
    commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return {"commit": commit.stdout.strip(), "order": order.recorded(checkout), "names": dict(sorted(found.items()))}


def path_of(host: str) -> Path:
    """Where a record lies."""
    return ROOT / "tests" / "contract" / f"{host}.json"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--webui", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--name", choices=HOSTS, required=True)
    options = parser.parse_args()
    try:
        made = record(options.webui, options.name)
    except LookupError as error:
        print(f"Not in this WebUI, though our code uses it:\n{error.args[0]}", file=sys.stderr)
        return 1
    path_of(options.name).write_text(json.dumps(made, indent=1) + "\n")
    print(f"{path_of(options.name).name}: {len(made['names'])} names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
