"""Runs tests on changed files, in forks of a process that has the libraries loaded: they take longer than most tests.

Each runs in a copy of the repository, so that programs which tests start see the change too, and nobody else does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Ignored by git, but tests look for them.
LINKS = (".venv", ".venv-gradio3", ".venv-gradio4")
LIBRARIES = ("torch", "numpy", "cv2", "scipy.special", "PIL.Image", "safetensors.torch", "torchsde", "torchdiffeq",
             "diffusers", "transformers", "hypothesis", "pytest", "coverage")
#: What stands in for a WebUI's modules, and what is tested, are loaded by each fork.
OURS = ("accdiff_lib", "tests", "testbed", "benchmarks", "modules")


def load_libraries() -> None:
    """Loads what no change touches."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)
    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)
    for package, names in ((diffusers, ("AutoencoderKL", "UNet2DConditionModel", "ControlNetModel")),
                           (transformers, ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"))):
        for name in names:
            getattr(package, name)


class Tree:
    """A copy of the repository, as it is, in which one run at a time takes place."""

    def __init__(self, folder: Path) -> None:
        self.root, self.temporary, self.log = folder / "tree", folder / "tmp", folder / "log"
        named = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                               check=True, capture_output=True, text=True).stdout
        for name in named.split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        for name in LINKS:
            if (ROOT / name).exists():
                (self.root / name).symlink_to((ROOT / name).resolve())
        self._changes = 0

    def write(self, path: str, source: str) -> None:
        """Each time at another time, by which Python knows that what it has compiled is old."""
        (self.root / path).write_text(source)
        self._changes += 1
        os.utime(self.root / path, (self._changes, self._changes))

    def restore(self, path: str) -> None:
        shutil.copy2(ROOT / path, self.root / path)


@dataclass
class Running:
    """Tests that run in a fork."""

    tree: Tree
    pid: int
    until: float

    def ended(self) -> int | None:
        """pytest's exit code, or a signal's number below zero; None as long as it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() > self.until:
            self.stop()
            pid, status = os.waitpid(self.pid, 0)
        if not pid:
            return None
        self.stop()  # what it has started
        return os.waitstatus_to_exitcode(status)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def start(tree: Tree, run: Callable[[], int], seconds: float) -> Running:
    """Runs something in a fork, in its tree, for so many seconds of a processor at most."""
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(tree.root)
            log = os.open(tree.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(log, number)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            sys.path[0] = str(tree.root)
            for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
                del sys.modules[name]
            code = run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    return Running(tree, pid, time.monotonic() + 20 * seconds)


def pytest_arguments(tree: Tree, tests: Sequence[str]) -> list[str]:
    return ["-x", "-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:randomly",
            f"--basetemp={tree.temporary}", *tests]


# --- which lines a test runs -----------------------------------------------------------------------------------

class Watch:
    """A plugin of pytest: which lines of the files each test runs, and how many seconds of a processor it takes; those
    that take more than so many are broken off and left out."""

    def __init__(self, files: Sequence[str], most: float) -> None:
        from coverage import Coverage

        self._files, self._most = files, most
        self._coverage = Coverage(data_file=None, config_file=False, include=[os.path.abspath(file) for file in files])
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    def run(self, test_file: str, result: Path, arguments: list[str]) -> int:
        import pytest

        def too_long(*_: object) -> None:
            pytest.skip("it takes too long")

        signal.signal(signal.SIGPROF, too_long)
        self._coverage.start()
        arguments.remove("-x")
        code = int(pytest.main([*arguments, test_file], plugins=[self]))
        self._coverage.stop()
        data = self._coverage.get_data()
        lines: dict[str, dict[str, list[int]]] = {}
        for file in self._files:
            for line, tests in data.contexts_by_lineno(os.path.abspath(file)).items():
                for test in set(tests) - {""}:
                    lines.setdefault(test, {}).setdefault(file, []).append(line)
        found = {test: {"seconds": round(seconds, 3), "lines": lines.get(test, {})}
                 for test, seconds in self._seconds.items() if test not in self._failed}
        result.write_text(json.dumps({"tests": found, "failed": sorted(self._failed)}))
        return code

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begin = _processor()
        self._coverage.switch_context(nodeid)

    def pytest_runtest_call(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._most)

    def pytest_runtest_teardown(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._coverage.switch_context("")
        self._seconds[nodeid] = _processor() - self._begin

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "failed", False) or getattr(report, "skipped", False):
            self._failed.add(getattr(report, "nodeid", ""))


def _processor() -> float:
    """Seconds of a processor so far, with those of ended programs."""
    return sum(os.times()[:4])


def in_parallel(trees: Sequence[Tree], jobs: Iterator[Callable[[Tree], Running]],
                ended: Callable[[Running, int], None]) -> None:
    """Starts each job in the next tree that is free, and says what became of it."""
    free, running = list(trees), []
    try:
        while True:
            while free and (job := next(jobs, None)) is not None:
                running.append(job(free.pop()))
            if not running:
                return
            time.sleep(0.05)
            for each in list(running):
                code = each.ended()
                if code is not None:
                    running.remove(each)
                    ended(each, code)
                    free.append(each.tree)
    finally:
        for each in running:
            each.stop()
