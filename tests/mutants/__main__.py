"""Mutation testing: makes small mistakes in the code, one at a time, and looks whether a test notices.

    python -m tests.mutants                       150 lines with a mistake each
    python -m tests.mutants --sample 0            every mistake there is: some hours
    python -m tests.mutants --seed 1 accdiff_lib/engine/plan.py

Which tests run a line is found out first, and kept; each mistake is shown to those, the fastest first, until one fails
or they have taken --seconds together. Everything found is kept in .mutants, so a run that was cut off goes on, and
after new tests only what survived is tried again. The last lines are a table, and what survived.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.mutants.changes import Mutant, mutants
from tests.mutants.runner import ROOT, Running, Tree, Watch, in_parallel, load_libraries, pytest_arguments, start

FILES = ("accdiff_lib/engine/*.py", "accdiff_lib/methods/*.py", "accdiff_lib/webui/run.py")
#: Where their tests are.
TESTS = ("tests/engine", "tests/methods", "tests/webui/test_run.py", "tests/webui/test_hosts_forge.py",
         "tests/standalone/test_host.py", "tests/standalone/test_residency.py")
#: The page of options, which shows what is made when a file is loaded.
PAGE = "tests/command/test_cli.py::test_readme_has_the_tables"
KEPT = ROOT / ".mutants"
#: What was not recognised as a mistake, judged by hand to be none: `path: before -> after`, a line each.
EQUIVALENT = Path(__file__).with_name("equivalent.txt")

KILLED, SURVIVED, UNSEEN = "killed", "survived", "no test runs it"


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


# --- which tests -----------------------------------------------------------------------------------------------

def covering(trees: Sequence[Tree], files: Sequence[str], places: Sequence[str], most: float) -> dict[str, Any]:
    """Of every test its seconds, and the lines of each of the files that it runs; by test file it is kept."""
    code = digest(*map(read, sorted(map(str, (ROOT / "accdiff_lib").rglob("*.py")))))
    test_files = [file for place in places for file in (
        sorted((ROOT / place).glob("test_*.py")) if (ROOT / place).is_dir() else [ROOT / place])]
    kept = {file: KEPT / f"lines-{file.stem}-{digest(code, read(file), str(most), *files)}.json" for file in test_files}
    missing = [file for file in test_files if not kept[file].exists()]

    def jobs() -> Iterator[Callable[[Tree], Running]]:
        for number, file in enumerate(missing):
            print(f"which lines tests run: {number} of {len(missing)} test files", file=sys.stderr)
            name = str(file.relative_to(ROOT))
            yield lambda tree, file=file, name=name: start(tree, lambda: Watch(files, most).run(
                name, kept[file], pytest_arguments(tree, [])), 3600)

    in_parallel(trees, jobs(), lambda running, code: None if code in (0, 1, 5) else sys.exit(
        f"pytest ended with {code}\n{running.tree.log.read_text()[-3000:]}"))
    found: dict[str, Any] = {PAGE: {"seconds": 0.5, "lines": {}}}
    for file in test_files:
        of_file = json.loads(kept[file].read_text())
        found |= of_file["tests"]
        for test in of_file["failed"]:
            print(f"left out, as it fails here or takes long: {test}", file=sys.stderr)
    return found


def tests_of(mutant: Mutant, tests: dict[str, Any], seconds: float) -> list[str]:
    """The tests that run its lines, or where those run when the file is loaded some of its lines, and the page; the
    fastest that take so many seconds together, each file's together."""
    first, last = mutant.lines
    those = [test for test, found in tests.items()
             if any(first <= line <= last for line in found["lines"].get(mutant.path, ()))]
    those = those or [PAGE, *(test for test, found in tests.items() if mutant.path in found["lines"])]
    chosen: dict[str, list[str]] = defaultdict(list)
    for test in sorted(those, key=lambda test: tests[test]["seconds"]):
        seconds -= tests[test]["seconds"]
        if seconds < 0 and chosen:
            break
        chosen[test.partition("::")[0]].append(test)
    return [test for of_file in chosen.values() for test in of_file]


# --- which mutants ---------------------------------------------------------------------------------------------

def drawn(every: Sequence[Mutant], sample: int, seed: int) -> list[Mutant]:
    """So many lines with a mistake each, as a line of many arguments is no more than another; 0 takes every mistake."""
    if not sample:
        return list(every)
    lines: dict[tuple[str, tuple[int, int]], list[Mutant]] = defaultdict(list)
    for mutant in every:
        lines[mutant.path, mutant.lines].append(mutant)
    chance = random.Random(seed)
    return [chance.choice(lines[line]) for line in chance.sample(sorted(lines), min(sample, len(lines)))]


class Results:
    """What became of mutants, kept line by line. One that survived is tried again by other tests."""

    def __init__(self, tests: str) -> None:
        KEPT.mkdir(exist_ok=True)
        self._path, self._tests = KEPT / "results.jsonl", tests
        self._found: dict[str, str] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            one = json.loads(line)
            if one["result"] == KILLED or one["tests"] == tests:
                self._found[one["mutant"]] = one["result"]

    def get(self, key: str) -> str | None:
        return self._found.get(key)

    def add(self, key: str, mutant: Mutant, result: str) -> None:
        self._found[key] = result
        with self._path.open("a") as file:
            file.write(json.dumps({"mutant": key, "tests": self._tests, "result": result, "what": str(mutant)}) + "\n")


def judged(trees: Sequence[Tree], those: Sequence[Mutant], tests: dict[str, Any], seconds: float) -> dict[str, str]:
    """What became of each mutant, by its text."""
    results = Results(digest(str(seconds), *sorted(tests), *(read(file) for file in sorted(
        {test.partition("::")[0] for test in tests}))))
    found: dict[str, str] = {}
    running: dict[int, tuple[str, Mutant]] = {}

    def jobs() -> Iterator[Callable[[Tree], Running]]:
        for number, mutant in enumerate(those):
            source = mutant.source
            if source is None:
                continue
            key = digest(mutant.path, source)
            known = results.get(key)
            if known is None:
                names = tests_of(mutant, tests, seconds)
                if names:
                    print(f"{number} of {len(those)}: {mutant}", file=sys.stderr)
                    yield partial(begin, mutant, key, source, names)
                    continue
                results.add(key, mutant, UNSEEN)
                known = UNSEEN
            found[str(mutant)] = known

    def begin(mutant: Mutant, key: str, source: str, names: list[str], tree: Tree) -> Running:
        import pytest

        tree.write(mutant.path, source)
        limit = 10 + 3 * sum(tests[name]["seconds"] for name in names)
        each = start(tree, lambda: int(pytest.main(pytest_arguments(tree, names))), limit)
        running[each.pid] = key, mutant
        return each

    def ended(each: Running, code: int) -> None:
        key, mutant = running.pop(each.pid)
        each.tree.restore(mutant.path)
        found[str(mutant)] = KILLED if code else SURVIVED
        results.add(key, mutant, found[str(mutant)])

    in_parallel(trees, jobs(), ended)
    return found


# --- what is said ----------------------------------------------------------------------------------------------

def report(found: dict[str, str], equivalent: set[str]) -> str:
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    alive = []
    for name, result in sorted(found.items()):
        path, _, rest = name.partition(":")
        same = result != KILLED and f"{path}: {rest.partition(': ')[2]}" in equivalent
        for key in (path, "together"):
            rows[key][0] += 1
            rows[key][1] += result == KILLED
            rows[key][2] += same
        if result != KILLED and not same:
            alive.append(f"{result}: {name}")
    width = max(map(len, rows))
    lines = [f"{'file':{width}}  mutants  killed  equivalent  survived  score"]
    for path in [*sorted(set(rows) - {"together"}), "together"]:
        count, killed, same = rows[path]
        lines.append(f"{path:{width}}  {count:7}  {killed:6}  {same:10}  {count - killed - same:8}  "
                     f"{killed / max(1, count - same):5.1%}")
    return "\n".join([*alive, "", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of these alone")
    parser.add_argument("--tests", nargs="+", metavar="PLACE", default=TESTS, help="of these files and folders alone")
    parser.add_argument("--sample", type=int, default=150, help="so many lines; 0 is every mistake")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--seconds", type=float, default=30, help="of tests, for a mistake")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    files = sorted(str(path.relative_to(ROOT)) for pattern in FILES for path in ROOT.glob(pattern))
    every = [mutant for file in files for mutant in mutants(file, read(file))]
    those = drawn([mutant for mutant in every if not given.files or mutant.path in given.files], given.sample,
                  given.seed)
    KEPT.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops what runs
    load_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trees = [Tree(Path(folder, str(number))) for number in range(given.jobs)]
        found = judged(trees, those, covering(trees, files, given.tests, given.seconds / 3), given.seconds)
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    print(report(found, {line.strip() for line in lines if line and not line.startswith("#")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
