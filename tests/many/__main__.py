"""Many pictures while workers are killed at random and the command is killed twice.

    python -m tests.many 1000              a thousand small jobs (64 to 128 pixels, 2 steps, built-in model)
    python -m tests.many 200 --workers 3   three workers; two without it

The same command is started again until it ends by itself. The last line is a JSON object: pictures that are missing,
half, there twice, or not bit by bit those of the command for single pictures; kills, tries, seconds, and the memory of
the command. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from accdiff_lib.command import run as single
from accdiff_lib.command.process import Stop
from accdiff_lib.many import run as many
from accdiff_lib.many.local import Local
from accdiff_lib.many.worker import own_bars
from accdiff_lib.standalone import loading

PROMPTS = ["a red ball", "a blue star on snow", "a castle, (night sky:1.2)", "a cat AND a dog :0.8",
           "[red:blue:0.5] ball"]
COMMON = ["--width", "64", "--height", "64", "--steps", "2", "--window", "8", "--no-use-controlnet"]
#: Seconds without a picture after which it is given up.
HUNG = 300


def preload() -> None:
    """What is loaded already need not be loaded by each process that is forked from this one."""
    loaded = loading.load(None)
    loading.load = lambda *_, **__: loaded


def fork(folder: Path, argv: list[str], workers: int) -> int:
    """The command in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        own_bars()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        with Stop(program=True) as stop:
            code = many.main(argv, stop, lambda *_: Local(["cpu"] * workers, method="fork"))
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory(pid: int) -> float:
    """MiB that are the process's own."""
    try:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("Private_")) / 1024


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def harass(folder: Path, argv: list[str], count: int, workers: int, every: float, chance: random.Random,
           told: dict[str, Any]) -> None:
    """Runs the command to its end, killing workers every so many pictures and the command twice."""
    out = folder / "pictures"
    killed_at = [count // 3, 2 * count // 3]
    while True:
        pid = fork(folder, argv, workers)
        told["runs"] += 1
        next_kill = len(pictures(out)) + chance.expovariate(1 / every) if every else count
        there, since = -1, time.monotonic()
        while True:
            ended, state = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(chance.uniform(0, 0.3))
            there, before = len(pictures(out)), there
            since = time.monotonic() if there != before else since
            if time.monotonic() - since > HUNG:
                told["hung"] = True
                for each in (pid, *children(pid)):
                    os.kill(each, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            if there % 50 < 3:
                told["memory"].append((there, round(memory(pid), 1)))
            if killed_at and there >= killed_at[0]:
                killed_at.pop(0)
                os.kill(pid, signal.SIGKILL)
                told["commands killed"] += 1
            elif next_kill <= there < count:
                victims = children(pid)
                if victims:
                    os.kill(chance.choice(victims), chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                    told["workers killed"] += 1
                next_kill += chance.expovariate(1 / every)
        code = os.waitstatus_to_exitcode(state)
        if code != -signal.SIGKILL:
            told["exit code"] = code
            return


def same(job: dict[str, Any], picture: Path, folder: Path) -> bool:
    """Whether the command for single pictures makes the same, with the same parameters."""
    argv = [job["prompt"], "--seed", str(job["seed"]), *COMMON, "--no-explain", "--no-intermediate", "--overwrite",
            "--out", str(folder / "single"), "--json"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert single.main(argv) == 0
    with Image.open(picture) as one, Image.open(folder / "single/final.png") as other:
        return one.tobytes() == other.tobytes() and one.info.get("parameters") == other.info.get("parameters")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.many", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=8.0, help="pictures between two kills of workers; 0 for none")
    parser.add_argument("--compare", type=int, default=None, help="so many pictures with single runs; all without it")
    given = parser.parse_args(argv)
    preload()
    chance = random.Random(given.seed)
    told: dict[str, Any] = {"runs": 0, "hung": False, "exit code": 0, "workers killed": 0, "commands killed": 0,
                            "memory": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [{"prompt": chance.choice(PROMPTS), "seed": number, "name": f"{number:05}"}
                for number in range(given.count)]
        (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        begin = time.monotonic()
        harass(folder, ["jobs.jsonl", *COMMON, "--json", "--retry", "5"], given.count, given.workers, given.every,
               chance, told)
        told["seconds"] = round(time.monotonic() - begin, 1)
        found = pictures(folder / "pictures")
        wanted = {f"{job['name']}.png" for job in jobs}
        lines = [json.loads(line) for line in (folder / "stdout").read_text().splitlines()]
        told |= {"pictures": given.count, "missing": len(wanted - found), "others": len(found - wanted),
                 "told": len({line["name"] for line in lines if "name" in line and "error" not in line}),
                 "left behind": sorted(path.name for path in (folder / "pictures/.accdiff-batch").iterdir()
                                       if path.suffix != ".speed" and path.name != "chance"),
                 "tried again": (folder / "stderr").read_text().count("is tried again"),
                 "tracebacks": (folder / "stderr").read_text().count("Traceback")}
        compared = chance.sample(jobs, given.compare) if given.compare is not None else jobs
        begin = time.process_time()
        told["different"] = sum(not same(job, folder / f"pictures/{job['name']}.png", folder) for job in compared
                                if f"{job['name']}.png" in found)
        told |= {"compared": len(compared), "CPU seconds alone": round(time.process_time() - begin, 1)}
        wrong = "missing", "others", "different", "left behind", "tracebacks", "exit code", "hung"
        if any(told[key] for key in wrong):
            print((folder / "stderr").read_text()[-4000:], file=sys.stderr)
            told["wrong"] = True
    memories = told.pop("memory")
    told["MiB of the command"] = memories[:: max(1, len(memories) // 8)]
    print(json.dumps(told))
    return int("wrong" in told)


if __name__ == "__main__":
    sys.exit(main())
