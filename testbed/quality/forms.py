"""The extent of the benchmark: which pictures its short and its long form need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testbed.quality.contenders import CLEAN, CONTENDERS, SAMPLED, SCALES, TRACKS, Contender
from testbed.quality.tasks import BOTH, Task
from testbed.sampling import SAMPLER, SCHEDULER, STEPS


@dataclass(frozen=True)
class Block:
    """A table of the report: the contenders of some kinds on one track at one scale."""
    track: str
    scale: int
    kinds: tuple[str, ...]
    scenes: int
    stage_steps: int


@dataclass(frozen=True)
class Form:
    """The benchmark's extent, and how the base pass is sampled; stages take its sampler and schedule."""
    name: str
    steps: int
    sampler: str
    scheduler: str
    blocks: tuple[Block, ...]


_EVERY = ("main", "ablation", "control")
#: For two CPU cores. With 6 scenes the paired test can reach p = 0.03, with fewer not even 0.05.
SHORT = Form("short", STEPS, SAMPLER, SCHEDULER, (
    Block(CLEAN, 4, ("main",), 2, 8), Block(SAMPLED, 4, ("main",), 2, 8),
    Block(CLEAN, 2, _EVERY, 6, 12), Block(SAMPLED, 2, ("main",), 6, 12)))
#: For a GPU, sampled as in the paper.
LONG = Form("long", 50, "Euler", "Leading", tuple(
    Block(track, scale, _EVERY, 40, 50) for scale in reversed(SCALES) for track in TRACKS))


def contenders(block: Block, only: Sequence[str] = ()) -> list[Contender]:
    """Those of a block, or (of any kind) those among `only` that its track and scale have."""
    return [each for each in CONTENDERS.values() if block.track in each.tracks and block.scale in each.scales
            and (each.name in only if only else each.kind in block.kinds)]


def task(block: Block, contender: Contender, number: int) -> Task:
    """The picture of a contender for a scene."""
    return Task(block.track if contender.has_base else BOTH, block.scale, contender.name, number, block.stage_steps)


def tasks(blocks: Sequence[Block], only: Sequence[str] = ()) -> list[Task]:
    """All pictures of the blocks, each once, those of the first scenes first."""
    return list(dict.fromkeys(
        task(block, contender, number) for number in range(max((block.scenes for block in blocks), default=0))
        for block in blocks if number < block.scenes for contender in contenders(block, only)))
