"""What callers may send, made up at random: plans, arguments of a generation, and pictures' parameters.

    python -m tests.webui.fuzz [--plans 12300] [--arguments 20000] [--infotexts 10000] [--seed 1]

Each must be answered in words or done: a plan by 200 or 422, arguments by an enlargement or an InputError that reaches
the user, parameters by restored controls or a switch that is off. Whatever else comes is printed and counted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accdiff_lib.errors import InputError
from accdiff_lib.methods import METHODS, OPTIONS, names
from accdiff_lib.parts import infotext
from accdiff_lib.settings import SAME, Option, is_text
from accdiff_lib.webui import arguments
from accdiff_lib.webui.arguments import BY_NAME_ONLY, DEVICES, POSITIONAL

#: What a message to a user may have of characters, the list of all options included.
LONGEST_MESSAGE = 3000
#: The seconds of the CPU that a plan may take; a busy machine counts some more.
SLOWEST = 2.0

#: 1 pixel, and the same cut off.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTjW2wAAAABJRU5ErkJggg=="
PROMPTS = ("a star", "", " ", "\ud800", "<lora:x:1>", "a" * 5000)


# --- values ----------------------------------------------------------------------------------------------------

def junk(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON."""
    kinds: list[Callable[[], Any]] = [
        lambda: None, lambda: rng.choice([True, False]), lambda: rng.randint(-3, 300),
        lambda: rng.choice([10 ** 400, -10 ** 400, 2 ** 63, 10 ** 18, -1]),
        lambda: rng.choice([float("nan"), float("inf"), -float("inf"), 1e308, -0.0, 5e-324, 0.1]),
        lambda: rng.choice(["", " ", "on", "None", "Same", "nan", "1e400", "9" * 400, "\ud800", "a\nb", "\0", "\u202e",
                            "1_0", "\u0661", "x" * 200_000, PIXEL, PIXEL[:40], "data:,", "/etc/passwd", "../../x"]),
        lambda: "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000)])) for _ in range(9)),
    ]
    if depth < 4:
        kinds += [lambda: [junk(rng, depth + 1) for _ in range(rng.randint(0, 4))],
                  lambda: {str(junk(rng, 9))[:20]: junk(rng, depth + 1) for _ in range(rng.randint(0, 3))}]
    if depth == 0:
        kinds.append(lambda: nested(rng.choice([50, 400])))
    return rng.choice(kinds)()


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = {"a": value} if number % 3 == 0 else [value]
    return value


def allowed(rng: random.Random, option: Option) -> Any:
    """A value that an option takes, often one at the end of its range."""
    if option.kind is bool:
        return rng.choice([True, False, "on", "off", 1, 0])
    if option.choices:
        return rng.choice(option.choices)
    if option.kind is str:
        return rng.choice(["Same", "Euler", "Heun", "Karras", "Automatic", "None", "no such thing"])
    assert option.minimum is not None and option.maximum is not None
    ends = [option.minimum, option.maximum, option.default]
    if option.kind is int:
        return int(rng.choice([*ends, rng.randint(int(option.minimum), int(option.maximum))]))
    return rng.choice([*ends, rng.uniform(option.minimum, option.maximum), str(option.minimum)])


def options(rng: random.Random, *, wild: float) -> dict[str, Any]:
    """Some options of a method; of all values a part is `wild`."""
    method, first = rng.choice(list(METHODS)), rng.choice([SAME, SAME, SAME, *METHODS])
    own = [name for name in names(method, first) if name not in ("method", "first_method")]
    found: dict[str, Any] = {"method": method, "first_method": first} if rng.random() < 0.8 else {}
    for name in rng.sample(own, rng.randint(0, 8)):
        found[name] = junk(rng) if rng.random() < wild else allowed(rng, OPTIONS[name])
    if rng.random() < 0.3:
        found["controlnet_model"] = rng.choice(["None", "canny", junk(rng)])
    if rng.random() < 0.3:
        found["regions"] = regions(rng)
    for name in BY_NAME_ONLY[1:]:
        if rng.random() < 0.1:
            found[name] = rng.choice([["0"], "all", junk(rng)] if name == DEVICES else [PIXEL, junk(rng)])
    if rng.random() < wild:
        found[rng.choice([*POSITIONAL, "sclae", "\ud800", "x" * 100_000, ""])] = junk(rng)
    return found


def regions(rng: random.Random) -> Any:
    box = [0, rng.choice([0.5, 1, 2, float("nan"), 10 ** 400]), 0, 1, rng.choice([1, 0, -1, "1"])]
    mask = rng.choice([PIXEL, f"data:image/png;base64,{PIXEL}", PIXEL[:50], junk(rng)])
    prompts = [rng.choice(PROMPTS) for _ in range(rng.choice([1, 2, 3, 40]))]
    return rng.choice([
        [{"prompt": prompt, "mask": mask} for prompt in prompts], {"prompts": prompts, "mask": mask},
        {"prompts": prompts, "mapping": [box] * len(prompts)}, {"prompts": prompts, "mapping": [box, mask]},
        [{"prompt": junk(rng), "mask": junk(rng), "negative": junk(rng)}], {"mapping": junk(rng)}, junk(rng)])


# --- plans -----------------------------------------------------------------------------------------------------

def plan_body(rng: random.Random) -> Any:
    from accdiff_lib.webui.ui.api import GENERATION

    wild = rng.choice([0, 0, 0.1, 0.5])
    if rng.random() < 0.03:
        return junk(rng)
    body = {name: junk(rng) if rng.random() < wild else allowed(rng, GENERATION[name])
            for name in rng.sample(list(GENERATION), rng.randint(0, 9))}
    for side in ("width", "height"):
        if isinstance(body.get(side), int) and rng.random() < 0.9:
            body[side] = rng.choice([256, 512, 1024, 2048, 64])
    asked = options(rng, wild=wild)
    if rng.random() < 0.2:
        body["args"] = rng.choice([[asked], [], [asked, junk(rng)], by_position(rng, asked, wild), junk(rng)])
        return body
    return {**body, **asked}


def plans(count: int, rng: random.Random) -> Iterator[str]:
    """What goes wrong with so many plans, over HTTP."""
    import fastapi
    from fastapi.testclient import TestClient

    from accdiff_lib.webui.ui import api

    app = fastapi.FastAPI()
    api.register(None, app)
    client = TestClient(app, raise_server_exceptions=False)
    for _ in range(count):
        body = json.dumps(plan_body(rng))
        begin = time.process_time()
        answer = client.post("/accdiffusion/v1/plan", content=body, headers={"Content-Type": "application/json"})
        seconds = time.process_time() - begin
        if answer.status_code not in (200, 422):
            yield f"status {answer.status_code}: {body[:300]}"
        elif answer.status_code == 422 and not 0 < len(str(answer.json()["detail"])) < LONGEST_MESSAGE:
            yield f"a bad message: {body[:300]}"
        elif seconds > SLOWEST:
            yield f"{seconds:.1f} seconds: {body[:2000]}"


# --- arguments of a generation ---------------------------------------------------------------------------------

def by_position(rng: random.Random, asked: dict[str, Any], wild: float) -> list[Any]:
    values = {"enabled": rng.choice([True, "on"]), "controlnet_model": "None",
              **{name: row.default for name, row in OPTIONS.items()}, **asked}
    listed = [junk(rng) if rng.random() < wild / 20 else values[name] for name in POSITIONAL]
    return listed[:rng.choice([len(listed), 46, rng.randint(0, len(listed))])] + [junk(rng)] * rng.choice([0, 0, 0, 40])


def arguments_of(rng: random.Random) -> list[Any]:
    wild = rng.choice([0, 0.05, 0.3])
    asked = options(rng, wild=wild)
    if rng.random() < 0.3:
        return by_position(rng, asked, wild)
    if rng.random() < 0.1:
        asked["enabled"] = rng.choice([True, False, "off", junk(rng)])
    return [asked, *rng.choice([[], ["None", "paper"], [junk(rng), junk(rng), junk(rng)]])]


def is_off(args: list[Any]) -> bool:
    """Whether arguments say so themselves."""
    given = args[0] if args else None
    switch = given.get("enabled", True) if isinstance(given, dict) else given
    if isinstance(switch, str):
        return switch.strip().lower() in ("off", "false", "no", "0")
    return switch in (False, 0) or (switch is None and not isinstance(given, dict))


def generations(count: int, rng: random.Random) -> Iterator[str]:
    """What goes wrong with so many arguments, up to where a generation would begin to sample."""
    from accdiff_lib.webui import run
    from tests.webui_stand_in.generation import started

    with started() as webui:
        for _ in range(count):
            args = json.loads(json.dumps(arguments_of(rng)))
            p = webui.generation(args[0] if args else None)
            p.prompts, p.negative_prompts = [p.prompt], [p.negative_prompt]  # as the WebUI sets them for each batch
            try:
                run.process(webui.script, p, args)
                begun = getattr(p, run.RUN_ATTRIBUTE, None)
                if begun is None:
                    if not is_off(args):
                        yield f"a silent plain picture: {args!r:.300}"
                    continue
                if isinstance(begun._asked, Exception):
                    raise begun._asked
                run.Batch(p, begun._asked, begun._find, begun.extras)
            except InputError as error:
                if not 0 < len(str(error)) < LONGEST_MESSAGE or "\n" in str(error) or not is_text(str(error)):
                    yield f"a bad message, {str(error)[:60]!r}: {args!r:.300}"
            except Exception as error:
                yield f"{type(error).__name__}: {args!r:.300}"


# --- pictures' parameters --------------------------------------------------------------------------------------

def parameters_of(rng: random.Random) -> str:
    """As a WebUI's text, whole or damaged."""
    values: dict[str, Any] = {"Steps": 20, "Sampler": "Euler", "Size": "64x64"}
    if rng.random() < 0.9:
        values["AccDiffusion"] = "2.0"
    asked = options(rng, wild=rng.choice([0, 0.3]))
    for name, value in asked.items():
        key = OPTIONS[name].infotext if name in OPTIONS else rng.choice(
            ["AccDiffusion ControlNet model", "AccDiffusion regions", "AccDiffusion news", "Other"])
        values[key] = str(value)[:3000]
    text = infotext.write("a cat", rng.choice(["", "bad"]), values)
    if rng.random() < 0.3:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", ",", ":", '"', "\\", "\n", "\ud800", "AccDiffusion: ", " " * 300]) + \
            text[place + rng.randint(0, 9):]
    return text


def pasted(count: int, rng: random.Random) -> Iterator[str]:
    """What goes wrong with so many texts that are sent to the panel."""
    from accdiff_lib.webui.ui import panel

    said: list[str] = []
    panel._warn = said.append  # type: ignore[assignment]
    fields = [panel._pasted(name) for name in ("method", "scale", "stride", "patch_size")]
    switch = panel._pasted_switch(False)
    for _ in range(count):
        text = parameters_of(rng)
        said.clear()
        try:
            parameters = infotext.parse(text).values
            ticked = switch(parameters)
            restored = [field(parameters) for field in fields]
            model = panel._pasted_model(parameters)
            if ticked:
                found = arguments.restored(parameters)
                assert found is not None and found.controlnet == model
                assert arguments.restored(arguments.infotext(found)) is not None
            elif "AccDiffusion" in parameters:
                assert said and set(restored) == {None}, "old settings, and nothing is said"
            if any(len(message) > LONGEST_MESSAGE for message in said):
                yield f"a message of {max(map(len, said))} characters: {text!r:.300}"
        except Exception as error:
            yield f"{type(error).__name__} {error!s:.100}: {text!r:.300}"


# --- the command -----------------------------------------------------------------------------------------------

@contextmanager
def webui() -> Iterator[None]:
    """With the stand-in's modules."""
    from tests.webui_stand_in import stood_in

    with stood_in():
        yield


KINDS = {"plans": (plans, 12_300), "arguments": (generations, 20_000), "infotexts": (pasted, 10_000)}


def failures(kind: str, count: int, seed: int) -> list[str]:
    """What went wrong with `count` of a kind."""
    with webui():
        return list(KINDS[kind][0](count, random.Random(f"{kind} {seed}")))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for kind, (_, count) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    total = 0
    for kind in KINDS:
        count, begin = getattr(given, kind), time.monotonic()
        found = failures(kind, count, given.seed)
        total += len(found)
        print(f"{kind}: {count} tried, {len(found)} failures, {time.monotonic() - begin:.0f} s", flush=True)
        for what, often in Counter(line.partition(":")[0] for line in found).most_common(20):
            print(f"  {often} x {what}; such as {next(line for line in found if line.startswith(what))}", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
