"""The panel as it looks: in light, in dark and in a narrow window. With ACCDIFF_SHOTS, a folder, also as pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SHOTS = os.environ.get("ACCDIFF_SHOTS")

#: Width of the window in pixels, and whether it is dark.
LOOKS = {"light": (1400, False), "dark": (1400, True), "narrow": (420, False)}

#: What reaches out of the panel or is cut off, and the contrast of the line under the controls (WCAG 2).
_FAULTS = """panel => {
    const faults = [], outer = panel.getBoundingClientRect();
    for (const each of panel.querySelectorAll("label, label span, input, button, .accdiff-cost")) {
        const box = each.getBoundingClientRect();
        if (!box.width || getComputedStyle(each).position === "absolute") continue;
        if (box.right > outer.right + 1 || box.left < outer.left - 1) {
            faults.push(`outside: ${each.outerHTML.slice(0, 80)}`);
        }
        const shown = each.tagName === "SPAN" && each.scrollWidth > each.clientWidth + 1;
        if (shown && getComputedStyle(each).overflow !== "visible") faults.push(`cut off: ${each.textContent}`);
    }
    const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, number) => sum + value * [0.2126, 0.7152, 0.0722][number], 0.05);
    const ground = element => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (!/, 0\\)$|transparent/.test(color)) return color;
        }
        return "rgb(255, 255, 255)";
    };
    for (const each of [panel.querySelector(".accdiff-cost"), ...panel.querySelectorAll(".accdiff-cost p")]) {
        const [one, other] = [getComputedStyle(each).color, ground(each)].map(light);
        const contrast = Math.max(one / other, other / one);
        if (contrast < 4.5) faults.push(`contrast ${contrast}: ${each.textContent}`);
    }
    return faults;
}"""


def look(page: Any, panel: str, name: str, folder: str | Path | None = SHOTS) -> dict[str, list[str]]:
    """The faults of each look of the element `panel`; pictures are NAME-LOOK.png. The window is as before then."""
    found, before = {}, page.viewport_size
    for kind, (width, dark) in LOOKS.items():
        page.set_viewport_size({"width": width, "height": 2400})
        was_dark = page.evaluate("document.body.classList.contains('dark')")
        _darken(page, dark)
        page.wait_for_timeout(400)
        found[kind] = page.eval_on_selector(panel, _FAULTS)
        if folder:
            page.locator(panel).screenshot(path=Path(folder) / f"{name}-{kind}.png")
        _darken(page, was_dark)
    page.set_viewport_size(before)
    return found


def _darken(page: Any, dark: bool) -> None:
    page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)

