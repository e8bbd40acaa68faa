"""The report: a Markdown table for each track and scale, and the same numbers with all p values as JSON."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accdiff_lib.settings import SUGGESTED
from testbed.quality.contenders import CLEAN, SUBJECT, Contender
from testbed.quality.forms import Block, contenders, task
from testbed.quality.metrics import METRICS, Metric
from testbed.quality.statistics import LEVEL, Estimate, difference, estimate, paired_p
from testbed.quality.tasks import Setup

SIGNIFICANT = 1 - LEVEL
_MARK = "\\*"
#: The preset that users begin with, and the one that measures best, are compared with these by these metrics.
OURS = (SUGGESTED, "best")
RIVALS = ("lanczos", "demofusion", SUBJECT)
COMPARED = ("exact", "extra", "ghosts", "patches", "iou", "psnr", "true_detail")

#: Of one contender, by scene.
Records = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A contender's estimates and p values against AccDiffusion v2 by metric, and its mean seconds a picture."""
    contender: Contender
    estimates: dict[str, Estimate]
    p: dict[str, float]
    seconds: float
    scenes: int


@dataclass(frozen=True)
class Versus:
    """A contender less a rival on the scenes that both have: differences and their p values by metric."""
    name: str
    rival: str
    scenes: int
    differences: dict[str, Estimate]
    p: dict[str, float]


@dataclass(frozen=True)
class Table:
    """One track at one scale."""
    block: Block
    rows: list[Row]
    versus: list[Versus]


def tabulate(blocks: Sequence[Block], only: Sequence[str], setup: Setup,
             results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Sums up the results (records by key) of all blocks; a contender may have some scenes only, or none."""
    tables = []
    for block in blocks:
        found: dict[str, Records] = {}
        for contender in contenders(block, only):
            keys = {number: setup.key(task(block, contender, number)) for number in range(block.scenes)}
            found[contender.name] = {number: results[key] for number, key in keys.items() if key in results}
        rows = [_row(contender, found[contender.name], found.get(SUBJECT, {}))
                for contender in contenders(block, only) if found[contender.name]]
        if rows:
            tables.append(Table(block, rows, [
                _versus(name, found[name], rival, found[rival]) for name in OURS for rival in RIVALS
                if set(found.get(name, ())) & set(found.get(rival, ()))]))
    return tables


def _row(contender: Contender, records: Records, subject: Records) -> Row:
    tested = {} if contender.name == SUBJECT else subject
    return Row(contender, {name: estimate(_values(records, records, name)) for name in METRICS},
               {name: _paired(records, tested, name) for name in METRICS},
               sum(record["seconds"] for record in records.values()) / len(records), len(records))


def _versus(name: str, records: Records, rival: str, others: Records) -> Versus:
    both = sorted(set(records) & set(others))
    return Versus(name, rival, len(both), {
        metric: difference(_values(records, both, metric), _values(others, both, metric)) for metric in COMPARED},
        {metric: _paired(records, others, metric) for metric in COMPARED})


def _paired(records: Records, others: Records, name: str) -> float:
    both = sorted(set(records) & set(others))
    return paired_p(_values(records, both, name), _values(others, both, name))


def _values(records: Records, scenes: Iterable[int], name: str) -> list[float]:
    """A metric of some scenes; nan where it has no meaning or was not measured yet."""
    found = [records[number]["metrics"].get(name) for number in scenes]
    return [math.nan if value is None else value for value in found]


def as_json(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """All numbers of the tables; None where there is none."""
    def plain(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 6)

    return [{"track": table.block.track, "scale": table.block.scale, "scenes": table.block.scenes,
             "stage_steps": table.block.stage_steps, "contenders": {row.contender.name: {
                 "scenes": row.scenes, "seconds": round(row.seconds, 3),
                 **{name: {"mean": plain(found.mean), "low": plain(found.low), "high": plain(found.high),
                           "count": found.count, "p": plain(row.p[name])} for name, found in row.estimates.items()}}
                 for row in table.rows},
             "differences": {name: {versus.rival: {
                 metric: {"mean": plain(found.mean), "low": plain(found.low), "high": plain(found.high),
                          "count": found.count, "p": plain(versus.p[metric])}
                 for metric, found in versus.differences.items()} for versus in table.versus if versus.name == name}
                 for name in OURS}} for table in tables]


def markdown(tables: Sequence[Table], setup: Setup, command: str, notes: Sequence[str],
             sheets: Mapping[Block, Path]) -> str:
    """The report; `notes` are lines for its header, `sheets` the contact sheets beside it."""
    model = "the embedded one" if setup.model is None else str(setup.model)
    changes = ", ".join(f"{name} = {value}" for name, value in setup.changes.items())
    head = [f"`{command}`", f"commit {commit()}", device_name(setup.device), f"model: {model}, {setup.dtype}",
            f"base pass: {setup.steps} steps, {setup.sampler}, {setup.scheduler}, CFG {setup.cfg:g}",
            f"scenes: seeds ({setup.seed_base}, 0) and on, kept out of training" + ", each with a word" * setup.letters,
            *([f"changed in AccDiffusion v2 and its variations: {changes}"] if changes else []), *notes]
    parts = ["# Quality on drawn scenes", "\n".join(f"* {line}" for line in head)]
    for table in tables:
        parts += [_title(table), _table(table)]
        if table.versus:
            parts.append(_differences(table))
        if table.block in sheets:
            parts.append(f"![{table.block.track}, {table.block.scale}x]({sheets[table.block].name})")
    return "\n\n".join([*parts, _legend(tables)]) + "\n"


def _title(table: Table) -> str:
    block, counts = table.block, sorted({row.scenes for row in table.rows})
    what = ("the scene's own render is enlarged; the render of the target size is the exact answer"
            if block.track == CLEAN else "the base picture is sampled from the caption")
    scenes = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return (f"## {block.track.capitalize()} start, {block.scale}x\n\n{what[0].upper()}{what[1:]}. "
            f"Scenes: {scenes}. Steps of a stage: {block.stage_steps}.")


def _table(table: Table) -> str:
    shown = [metric for metric in METRICS.values() if any(row.estimates[metric.name].count for row in table.rows)]
    uneven = len({row.scenes for row in table.rows}) > 1
    lines = [["", *["scenes"] * uneven, *(metric.label for metric in shown), "seconds"]]
    lines.append(["---"] * len(lines[0]))
    for row in table.rows:
        name = f"**{row.contender.name}**" if row.contender.name == SUBJECT else row.contender.name
        lines.append([name, *[str(row.scenes)] * uneven, *(_entry(metric, row) for metric in shown),
                      f"{row.seconds:.1f}"])
    return _rows(lines)


def _differences(table: Table) -> str:
    lines = [["differences", "scenes", *(METRICS[name].label for name in COMPARED)]]
    lines.append(["---"] * len(lines[0]))
    for versus in table.versus:
        lines.append([f"*{versus.name}* less {versus.rival}", str(versus.scenes), *(
            _change(METRICS[name], versus.differences[name], versus.p[name]) for name in COMPARED)])
    return f"Differences on the same scenes, with the p values of their signs' flips:\n\n{_rows(lines)}"


def _change(metric: Metric, found: Estimate, p: float) -> str:
    """A mean difference, its interval, and the p value."""
    if not found.count:
        return "-"
    text = f"{found.mean:+.{metric.digits}f}"
    if found.low < found.high:
        text += f" ({found.low:+.{metric.digits}f} to {found.high:+.{metric.digits}f})"
    return text + ("" if math.isnan(p) else f", p = {p:.2g}" if p >= 0.001 else ", p < 0.001")


def _rows(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _entry(metric: Metric, row: Row) -> str:
    """Mean, interval, and a mark for a difference from AccDiffusion v2."""
    found = row.estimates[metric.name]
    if not found.count:
        return "-"
    text = f"{found.mean:.{metric.digits}f}"
    if found.low < found.high:
        text += f" ({found.low:.{metric.digits}f} to {found.high:.{metric.digits}f})"
    return text + _MARK * (row.p[metric.name] < SIGNIFICANT)


def _legend(tables: Sequence[Table]) -> str:
    described = [f"* **{metric.label}**: {metric.about}"
                 + ("." if metric.best is None else f" (best: {metric.best:g}).") for metric in METRICS.values()]
    named = {row.contender.name: row.contender for table in tables for row in table.rows}
    about = [f"* **{name}**: {contender.about}." for name, contender in named.items() if contender.about]
    return "\n".join([
        "## How to read this", "",
        f"Means over scenes with 95 % bootstrap intervals (none where all scenes have one value). {_MARK} differs from "
        f"{SUBJECT} on the same scenes with p < {SIGNIFICANT:.2g} (sign flips, two-sided, not corrected for the number "
        "of comparisons: one in twenty is expected by chance). - has no meaning there: pictures made from noise have "
        "no base picture to keep to. Wanted is the scene on the clean track, what the base picture shows on the "
        "sampled one, where only *exact* is against the caption. Seconds are of one job, with the VAE.",
        "", *described, "", *about])


def commit() -> str:
    """The commit of this code, and whether files were changed since."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        " with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return names[0] if names else platform.processor() or "unknown processor"
