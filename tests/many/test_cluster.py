"""Many pictures on a real Ray: two workers, on loopback only. `make cluster-test` installs what it takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.command import run as single

pytest.importorskip("ray")

ROOT = Path(__file__).resolve().parents[2]
PORT = 26379
TINY = ["--width", "64", "--height", "64", "--steps", "2", "--window", "8", "--no-use-controlnet"]
#: Addresses of this machine are loopback ones, actors are no slower than others, and nobody is told of it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1",
               "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
               "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster():
    """The address of a cluster of this machine, with two CPUs."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # names of sockets are short
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
         f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}"],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{PORT}"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def command(address: str, **streams) -> subprocess.Popen:
    argv = ["batch", "jobs.jsonl", *TINY, "--json", "--ray", address]
    return subprocess.Popen([sys.executable, "-m", "accdiff_lib", *argv], env=ENVIRONMENT, text=True, **streams)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_killed_actor_and_a_stopped_command_lose_nothing(cluster, tmp_path, monkeypatch, models, capsys):
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text("".join(json.dumps({"prompt": f"a ball {number % 2}", "seed": number,
                                                      "name": str(number)}) + "\n" for number in range(8)))

    def made() -> int:
        return len(list(Path("pictures").glob("*.png")))

    with Path("said").open("w") as said:
        process = command(cluster, stdout=said, stderr=said)
        wait_for(lambda: made() >= 2, process)
        actors = [int(each) for each in re.findall(r"process (\d+)", Path("said").read_text())]
        assert actors, Path("said").read_text()
        os.kill(actors[0], signal.SIGKILL)
        wait_for(lambda: made() >= 4, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, Path("said").read_text()
    process = command(cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and made() == 8, err
    assert json.loads(out.splitlines()[-1])["failed"] == 0 and not Path("pictures/failed.jsonl").exists()
    for number in (0, 7):
        argv = [f"a ball {number % 2}", "--seed", str(number), *TINY, "--out", "alone", "--overwrite", "--json"]
        assert single.main(argv) == 0
        with Image.open("alone/final.png") as one, Image.open(f"pictures/{number}.png") as other:
            assert np.array_equal(one, other) and one.info["parameters"] == other.info["parameters"]
