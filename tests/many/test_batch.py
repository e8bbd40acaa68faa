"""A folder of many pictures: all are made as alone, whoever dies meanwhile, and what fails is told."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accdiff_lib.command import run as single
from accdiff_lib.command.folder import Folder
from accdiff_lib.command.report import Told
from accdiff_lib.errors import InputError
from accdiff_lib.many import driver, ledger, run, speed
from accdiff_lib.many.ledger import Ledger
from accdiff_lib.many.local import Event
from accdiff_lib.many.worker import Worker
from accdiff_lib.standalone.text import TextEncoder
from tests.many import __main__ as torture

TINY = ["--width", "64", "--height", "64", "--steps", "1", "--window", "8", "--no-use-controlnet", "--keep-every", "0"]
JOBS = [{"prompt": "a red ball", "seed": 1, "name": "one"}, {"prompt": "a red ball", "seed": 2, "name": "two"},
        {"prompt": "a blue star, (snow:1.2)", "batch": 2, "name": "star"}]
NAMES = ["one", "star-42", "star-43", "two"]


@pytest.fixture(autouse=True)
def jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in JOBS))
    for module, name, value in ((driver, "TICK", 0.02), (driver, "LOOK", 0.05), (ledger, "BEAT", 0.05)):
        monkeypatch.setattr(module, name, value)


class Threads:
    """Workers in this process. With `die`, orders of a name kill their worker, so often as it says; implements Pool."""

    def __init__(self, workers: int = 1, make=None, die: dict[str, int] | None = None) -> None:
        self._make, self._die = make, die if die is not None else {}
        self._said: queue.Queue[Event] = queue.Queue()
        self._inboxes: dict[int, queue.Queue] = {}
        self._workers: dict[int, Worker] = {}
        self.orders: list[tuple[int, str]] = []
        self.killed = 0
        self.alive = True
        for worker in range(workers):
            self._start(worker)

    def _start(self, worker: int) -> None:
        self._inboxes[worker], self._workers[worker] = queue.Queue(), Worker("cpu")
        threading.Thread(target=self._serve, args=(worker, self._workers[worker], self._inboxes[worker]),
                         daemon=True).start()
        self._said.put(Event(worker, "ready", {"host": "here", "pid": 1, "device": "cpu", "tflops": 1.0}))

    def _serve(self, worker: int, maker: Worker, inbox: queue.Queue) -> None:
        while (order := inbox.get()) is not None:
            self.orders.append((worker, order.name))
            if self._die.get(order.name, 0):
                self._die[order.name] -= 1
                self.kill(worker)
                return
            told = (self._make or maker.make)(order)
            if self._workers[worker] is maker:
                self._said.put(Event(worker, "made", told))

    def give(self, worker, order):
        self._inboxes[worker].put(order)

    def events(self, seconds):
        try:
            return [self._said.get(timeout=seconds)]
        except queue.Empty:
            return []

    def kill(self, worker):
        self.killed += 1
        self._said.put(Event(worker, "died", {"reason": "it was killed"}))
        self._start(worker)

    def stop(self):
        for worker in self._workers.values():
            worker.stop.ask()

    def close(self):
        for inbox in self._inboxes.values():
            inbox.put(None)


@pytest.fixture
def batch(models, capsys):
    """Runs the command: its exit code, its lines by name, its last line, and stderr."""
    def call(*argv: str, pool=None, jobs: str = "jobs.jsonl"):
        code = run.main([jobs, *TINY, "--json", *argv], make_pool=lambda *_: pool or Threads())
        out, err = capsys.readouterr()
        lines = [json.loads(line) for line in out.splitlines()]
        return code, {line["name"]: line for line in lines[:-1]}, lines[-1], err
    return call


def made() -> list[str]:
    return sorted(path.stem for path in Path("pictures").glob("*.png"))


def left() -> list[str]:
    return sorted(path.name for path in Path("pictures/.accdiff-batch").iterdir()
                  if path.suffix != ".speed" and path.name != "chance")


def alone(name: str, prompt: str, seed: int) -> bool:
    """Whether the single command makes the same picture, with the same parameters."""
    assert single.main([prompt, "--seed", str(seed), *TINY, "--out", "alone", "--overwrite", "--json"]) == 0
    with Image.open("alone/final.png") as one, Image.open(f"pictures/{name}.png") as other:
        return np.array_equal(one, other) and one.info["parameters"] == other.info["parameters"]


def test_all_are_made_as_alone_and_once(batch, monkeypatch, capsys):
    encoded = []
    before = TextEncoder._encode_batch
    monkeypatch.setattr(TextEncoder, "_encode_batch", lambda self, chunks: encoded.append(
        tuple(chunks)) or before(self, chunks))
    code, told, end, _ = batch()
    assert code == 0 and made() == NAMES == sorted(told) and left() == []
    assert len(encoded) == len(set(encoded))  # equal texts once
    assert end | {"seconds": 0} == {"pictures": 4, "there": 0, "made": 4, "failed": 0, "left": 0, "seconds": 0}
    assert told["star-43"] | {"seconds": 0, "tflop": 0} == {
        "name": "star-43", "line": 3, "seed": 43, "tflop": 0, "file": "pictures/star-43.png", "width": 128,
        "height": 128, "seconds": 0, "resumed": "", "comments": []}
    assert alone("two", "a red ball", 2) and alone("star-43", "a blue star, (snow:1.2)", 43)
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in Path("pictures").glob("*.png")}
    code, told, end, _ = batch(pool="none is needed")
    assert code == 0 and not told and end["there"] == 4
    assert {path: path.stat().st_mtime_ns for path in Path("pictures").glob("*.png")} == times
    assert run.main(["jobs.jsonl", *TINY, "--status"]) == 0 and "4 of 4 pictures" in capsys.readouterr().out
    Path("pictures/one.png").unlink()
    assert run.main(["jobs.jsonl", *TINY, "--dry-run", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert (costs["there"], costs["left"], costs["measured"]) == (3, 1, True)


def test_a_worker_that_dies_loses_nothing_and_what_always_fails_is_told(batch):
    code, told, end, _ = batch("--retry", "1", pool=Threads(make=stub, die={"one": 1, "two": 9}))
    assert code == 1 and made() == ["one", "star-42", "star-43"] and end["failed"] == 1
    failed = json.loads(Path("pictures/failed.jsonl").read_text())
    assert failed == {"line": 2, "name": "two", "seed": 2, "error": "it was killed", "attempts": 2, "job": JOBS[1]}
    assert told["two"]["error"] == "it was killed" and left() == ["two.failed"]
    assert batch(pool=Threads(make=stub))[0] == 0 and made() == NAMES and left() == []  # it is tried again
    assert not Path("pictures/failed.jsonl").exists()


def test_what_cannot_be_is_not_tried_again(batch, monkeypatch):
    def load(*args, **kwargs):
        raise InputError("--model: gone")

    monkeypatch.setattr("accdiff_lib.standalone.loading.load", load)
    pool = Threads()
    code, told, _, _ = batch(pool=pool)
    assert code == 1 and len(pool.orders) == 4 and {each["error"] for each in told.values()} == {"--model: gone"}


def test_stopped_it_keeps_what_is_computed_and_goes_on(batch, monkeypatch):
    advance, sent = Told.advance, []

    def stop(self, latents):
        advance(self, latents)
        if len(made()) == 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(0.3)

    monkeypatch.setattr(Told, "advance", stop)
    code, told, end, err = batch()
    assert code == 143 and len(made()) == 1 and end["left"] == 3 and "the same command" in err
    assert "Traceback" not in err and list(Path("pictures/.accdiff-batch").glob("*/*.npz"))
    code, told, end, _ = batch()
    assert code == 0 and made() == NAMES and left() == [] and not Path("pictures/parts").exists()
    assert sum(line["resumed"] != "" for line in told.values()) == 1
    assert alone("two", "a red ball", 2)


def test_a_hung_worker_is_ended(batch, monkeypatch):
    monkeypatch.setattr(speed, "limit", lambda *_: 0.2)
    done = threading.Event()
    pool = Threads(make=lambda order: done.wait(20))
    code, told, _, _ = batch("--retry", "0", pool=pool)
    done.set()
    assert code == 1 and pool.killed == 4 and "longer than 0 s" in told["one"]["error"]


def stub(order):
    """A picture in no time."""
    Path(order.arguments.out, f"{order.name}.png").write_bytes(b"a picture")
    return {"state": "done", "comments": []}


def test_models_are_kept_and_a_sick_worker_is_left_out(batch, tmp_path):
    lines = [{"prompt": f"a {number} <lora:{'ab'[number % 2]}:1>", "name": f"{number:02}"} for number in range(20)]
    Path("lora.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    price, run.price = run.price, lambda *_: None  # there are no such LoRAs
    try:
        pool = Threads(make=stub)
        assert batch(pool=pool, jobs="lora.jsonl")[0] == 0
        kinds = [int(name) % 2 for _, name in pool.orders]
        assert sum(one != two for one, two in zip(kinds, kinds[1:], strict=False)) == 1
        for path in Path("pictures").glob("*.png"):
            path.unlink()

        pool = Threads(2)
        pool._make = lambda order: stub(order) if threading.current_thread() is not sick else {
            "state": "failed", "error": "the device is gone"}
        sick = next(thread for thread in threading.enumerate() if getattr(thread, "_args", ())[:1] == (1,))
        assert batch(pool=pool, jobs="lora.jsonl")[0] == 0  # each was tried again by the other one
        assert sum(worker == 1 for worker, _ in pool.orders) <= driver.FAILURES
    finally:
        run.price = price


def test_a_full_disk_ends_it_and_the_same_command_goes_on(batch, monkeypatch):
    check = Folder.check

    def full(self, size):
        if len(made()) == 2 and size:
            raise InputError("--out: pictures has 1 MB free")
        check(self, size)

    monkeypatch.setattr(Folder, "check", full)
    code, _, end, err = batch(pool=Threads(make=stub))
    assert code == 1 and len(made()) == 2 and "1 MB free" in end["error"] and "1 MB free" in err
    monkeypatch.setattr(Folder, "check", check)
    assert batch(pool=Threads(make=stub))[0] == 0 and made() == NAMES and left() == []


def test_overwrite_makes_them_again(batch):
    Path("pictures").mkdir()
    for name in NAMES:
        Path(f"pictures/{name}.png").write_bytes(b"old")
        os.utime(f"pictures/{name}.png", (1, 1))
    assert batch(pool="none is needed")[2]["there"] == 4
    assert batch("--overwrite", pool=Threads(make=stub))[2]["made"] == 4 and left() == []
    assert Path("pictures/one.png").read_bytes() == b"a picture"


def test_a_worker_that_does_not_see_the_folder_sends_the_picture(batch, models, monkeypatch):
    monkeypatch.setattr(driver.Driver.__init__, "__kwdefaults__", {"overwrite": False, "sign": "nowhere"})
    init = driver.Driver.__init__
    monkeypatch.setattr(driver.Driver, "__init__", lambda *args, **kwargs: init(*args, **{**kwargs, "sign": "nowhere"}))
    Path("jobs.jsonl").write_text(json.dumps(JOBS[0]) + "\n")
    code, told, _, _ = batch("--intermediate")
    assert code == 0 and made() == ["one"] and left() == [] and told["one"]["file"] == "pictures/one.png"
    assert {path.name for path in Path("pictures/parts").iterdir()} == {"one-base.png"}


# --- several programs on one folder ----------------------------------------------------------------------------

@pytest.fixture
def two():
    """The same folder as two programs know it."""
    both = [Ledger(Path("pictures")) for _ in range(2)]
    for each in both:
        each.open()
    yield both
    for each in both:
        each.close()


def test_a_claim_is_one_programs(two, monkeypatch):
    one, other = two
    assert one.claim("a") == 1 and other.claim("a") is None and other.claim("b") == 1
    assert list(other.at_work()) == ["a"]
    one.release("a")
    assert other.claim("a") == 1


def test_a_dead_programs_claim_and_what_it_kept_are_handed_on_once(two, monkeypatch):
    monkeypatch.setattr(ledger, "LEASE", 0.5)
    one, other = two
    one.claim("a")
    kept = Path("pictures/.accdiff-batch/a.1")
    kept.mkdir()
    (kept / "base.npz").write_bytes(b"12345")
    begin = time.monotonic()
    while time.monotonic() - begin < 1.0:  # it is alive as long as its claim changes, whatever the time is elsewhere
        os.utime("pictures/.accdiff-batch/a.1.claim", (1, 1))
        assert other.claim("a") is None
        time.sleep(0.1)
    one._stop.set()  # it hangs, with its lock
    assert other.claim("a") is None
    time.sleep(0.7)
    third = Ledger(Path("pictures"))
    third.open()
    assert third.claim("a") is None  # which has not watched it yet
    assert other.claim("a") == 2 and other.kept("a") == 5 and third.claim("a") is None
    one.release("a")  # awake again, it takes nothing away
    assert third.claim("a") is None and other.kept("a") == 5
    other.finished("a")
    third.close()
    assert not [path for path in Path("pictures/.accdiff-batch").iterdir() if path.name.startswith("a.")]


def test_on_one_machine_a_killed_programs_claim_is_free_at_once(two):
    one, other = two
    one.claim("a")
    assert other.claim("a") is None
    one._lock.release()
    assert other.claim("a") == 2


def test_two_programs_share_the_pictures(batch, two):
    one, _ = two
    assert one.claim("star-42") and one.claim("two")

    begun = threading.Event()

    def later():
        begun.wait()
        time.sleep(0.1)
        Path("pictures/star-42.png").write_bytes(b"theirs")
        one.finished("star-42")
        one.failed("two", {"line": 2, "name": "two", "error": "there is no model"})

    thread = threading.Thread(target=later)
    thread.start()
    code, told, _, _ = batch(pool=Threads(make=lambda order: begun.set() or stub(order)))
    thread.join()
    assert code == 1 and made() == ["one", "star-42", "star-43"]
    assert told["star-42"]["elsewhere"] and told["two"]["error"] == "there is no model"
    assert Path("pictures/star-42.png").read_bytes() == b"theirs"


# --- processes -------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers in /proc")
def test_killed_workers_and_a_command_killed_twice(capsys, models):
    """`python -m tests.many 1000` takes longer."""
    code = torture.main(["5", "--every", "2", "--compare", "1"])
    out, err = capsys.readouterr()
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["commands killed"] == 2 and told["missing"] == told["different"] == 0
