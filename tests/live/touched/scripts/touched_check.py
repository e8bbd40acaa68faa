"""Says in the log what this WebUI lacks of the record ACCDIFF_CHECK, when extensions that need it would be loaded."""

import json
import os
import sys
import time

if os.environ.get("ACCDIFF_CHECK"):
    with open(os.environ["ACCDIFF_CHECK"], encoding="utf-8") as file:
        record = json.load(file)
    begin = time.perf_counter()
    lines = sys.modules["tests.contract.check"].lacking(record)
    print(f"[touched] {len(lines)} lines, {time.perf_counter() - begin:.2f} s", *lines, sep="\n[touched] ")
