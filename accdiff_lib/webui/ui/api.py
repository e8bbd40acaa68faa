"""HTTP: the table of options, the size of the loaded model, and a plan with its cost, without generating.

    GET  /accdiffusion/v1/options
    GET  /accdiffusion/v1/model
    POST /accdiffusion/v1/plan     {"width": 1024, "height": 1024, "steps": 30, "scale": 4, "preset": "fast"}

With --api-auth they want a user's name and password, as the WebUI's own routes do. The line under the panel's scale is
a plan's "size" and "text" (javascript/accdiff.js); who has the page needs no password for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from accdiff_lib import __version__
from accdiff_lib.errors import InputError, named
from accdiff_lib.methods import METHODS, OPTIONS, names
from accdiff_lib.settings import LARGEST, PRESETS, Option
from accdiff_lib.webui import model
from accdiff_lib.webui.arguments import BY_NAME_ONLY, DEVICES, EXTRA, NONE, POSITIONAL, REGIONS, Enlargement, parse
from accdiff_lib.webui.hosts import webui as webui_host
from accdiff_lib.webui.ui import options_page

#: What the page sends along, in this header: it is in the panel, which the WebUI's own login guards if there is one.
PAGE_KEY, PAGE_HEADER = secrets.token_urlsafe(), "X-AccDiffusion-Page"

#: What the lists of Hires. fix call the base pass's.
SAME_SAMPLER, SAME_SCHEDULER = "Use same sampler", "Use same scheduler"

#: What a plan depends on besides the options; the names are those of txt2img's and img2img's API where they have them.
GENERATION: dict[str, Option] = {row.name: row for row in (
    Option("width", "width", "Width of the base picture in pixels.", 1024, "generation", 64, LARGEST),
    Option("height", "height", "Height of the base picture in pixels.", 1024, "generation", 64, LARGEST),
    Option("steps", "steps", "Sampling steps of the base pass.", 20, "generation", 1, 1000),
    Option("cfg_scale", "CFG scale", "CFG scale of the base pass.", 7.0, "generation", 1, 30),
    Option("sampler_name", "sampler", "Sampler of the base pass.", "Euler", "generation"),
    Option("scheduler", "schedule type", "Schedule type of the base pass.", "Automatic", "generation"),
    Option("denoising_strength", "denoising strength", "That of Hires. fix or img2img.", 0.75, "generation", 0, 1),
    Option("enable_hr", "Hires. fix", "Hires. fix is ticked and says size, steps and start.", False, "generation"),
    Option("hr_scale", "upscale by", "Its size.", 2.0, "generation", 1, 8),
    Option("hr_resize_x", "resize width to", "Its width; 0 goes by the others.", 0, "generation", 0, LARGEST),
    Option("hr_resize_y", "resize height to", "Its height; 0 goes by the others.", 0, "generation", 0, LARGEST),
    Option("hr_second_pass_steps", "hires steps", "Its steps; 0 takes those of the base pass.", 0, "generation", 0,
           1000),
    Option("hr_sampler_name", "hires sampler", "Its sampler.", SAME_SAMPLER, "generation"),
    Option("hr_scheduler", "hires schedule type", "Its schedule type.", SAME_SCHEDULER, "generation"),
    Option("batch", "batch", "So many pictures.", 1, "generation", 1, 10000),
    Option("from_image", "from image", "The base picture is given, as in img2img.", False, "generation"),
    Option("native", "native size", "Side of the model's own latent in cells: 128 for SDXL, 64 for SD1.5; 0 is the "
           "loaded checkpoint's.", 0, "generation", 0, 512))}


#: Parts of the picture that have prompts of their own, as a property of the schema.
_MASK = {"type": "string", "description": "A picture in base64, also as a data URL; bright is inside."}
_REGIONS = {
    "title": REGIONS, "default": [], "x-group": "windows",
    "description": "Parts of the picture that have prompts of their own, for methods with windows: each with its "
                   "prompt and mask, or the prompts and one mask in Regional Prompter's colours or Forge Couple's "
                   "mapping.",
    "anyOf": [{"type": "array", "items": {"type": "object", "required": ["prompt", "mask"], "properties": {
        "prompt": {"type": "string"}, "negative": {"type": "string"}, "mask": _MASK}}},
        {"type": "object", "required": ["prompts", "mask"], "properties": {
            "prompts": {"type": "array", "items": {"type": "string"}}, "mask": _MASK}},
        {"type": "object", "required": ["prompts", "mapping"], "properties": {
            "prompts": {"type": "array", "items": {"type": "string"}}, "mapping": {
                "type": "array", "description": "For each prompt [left, right, top, bottom, weight] in parts of the "
                "picture, or a mask and its weight."}}}]}

_BY_NAME_ONLY = {REGIONS: _REGIONS} | {name: {
    "type": "string", "contentEncoding": "base64", "title": name.replace("_", " "), "x-group": "control",
    "description": f"A picture whose {what} through the ControlNet, in place of the last picture's edges.",
} for name, what in (("control_image", "edges guide the stages"), ("control_map", "levels guide the stages as they are "
                     "(a depth map, say)"))} | {DEVICES: {
    "type": "array", "items": {"type": "string"}, "title": DEVICES, "x-group": "panel",
    "description": 'The numbers of GPUs that help beside the WebUI\'s own, or ["all"]; the picture stays the same. '
                   "Without it those that the settings page says."}}


def schema() -> dict[str, Any]:
    """The table as a JSON schema of the dict that `alwayson_scripts.AccDiffusion.args[0]` takes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "AccDiffusion", "type": "object",
        "additionalProperties": False, "x-version": __version__,
        "properties": {row.name: _property(row) for row in [*EXTRA.values(), *OPTIONS.values()]} | _BY_NAME_ONLY,
        "x-positional": list(POSITIONAL), "x-presets": PRESETS,
        "x-methods": {name: {"options": names(name), "values": method.values} for name, method in METHODS.items()}}


def _property(row: Option) -> dict[str, Any]:
    kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[row.kind]
    # A dict that is given at all is enabled, unless it says otherwise.
    default = True if row.name == "enabled" else row.default
    found: dict[str, Any] = {"type": kind, "title": row.label, "description": row.help, "default": default,
                             "x-group": row.group, "x-infotext": row.infotext}
    found |= {name: value for name, value in (("minimum", row.minimum), ("maximum", row.maximum),
                                              ("x-step", row.step)) if value is not None}
    return found | ({"enum": list(row.choices)} if row.choices else {})


def plan(body: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, stages, latents evaluated and relative cost of a generation. Raises InputError."""
    given, asked = _request(body)
    from accdiff_lib.webui import hires, outline  # with torch
    from accdiff_lib.webui.ui import line

    given.height, given.width = hires.base_size(given, None)
    ticked = given.enable_hr and not given.from_image
    settings = hires.driven(given, asked.settings, ticked=ticked, from_image=given.from_image)
    sampler, scheduler = hires.stage_sampler(given, settings, ticked=ticked)
    native, multiple = model.for_size(given.width, given.height)
    native = given.native or native
    cost = outline.cost(settings, outline.Generation(
        (given.height, given.width), given.steps, given.cfg_scale, given.sampler_name, sampler, scheduler, native,
        multiple, has_control=asked.controlnet != NONE, from_image=given.from_image,
        regions=asked.regions, has_guide=asked.guide is not None))
    return {**outline.as_json(cost, given.batch), "native": native, "notes": list(settings.notes),
            "text": line.text(cost, native, pictures=given.batch, tile=settings.vae_tile,
                              devices=options_page.helping(asked.devices)),
            "says": line.says(cost, asked, settings, given, ticked=ticked)}


def _request(body: Mapping[str, Any]) -> tuple[SimpleNamespace, Enlargement]:
    """What a plan is asked for: the generation by the names of GENERATION, and the options. Raises InputError.

    The options stand beside those names, or under "args" in any of the forms that `arguments.parse` knows.
    """
    known = [*GENERATION, "args", *POSITIONAL, *BY_NAME_ONLY]
    for name in body:
        if name not in known:
            raise InputError(f"{named(name)}: there is no such option; the options are {', '.join(known)}")
    said = {name: value for name, value in body.items() if value is not None}
    given = SimpleNamespace(**{name: row.parse(said.get(name, row.default)) for name, row in GENERATION.items()})
    given.width, given.height = map(webui_host.current().rounded, (given.width, given.height))
    given.hr_sampler_name = None if given.hr_sampler_name == SAME_SAMPLER else given.hr_sampler_name
    given.hr_scheduler = None if given.hr_scheduler == SAME_SCHEDULER else given.hr_scheduler
    options = {name: value for name, value in said.items() if name in (*POSITIONAL, *BY_NAME_ONLY)}
    args = said.get("args", [options])
    if not isinstance(args, list) or (options and "args" in said):
        raise InputError("args: takes a list, and no options beside it")
    asked = parse(args, overrides={"enabled": True}, defaults=options_page.defaults())
    assert asked is not None
    return given, asked


def register(_demo: Any, app: Any) -> None:
    """Adds the routes; a callback of `on_app_started`, which the WebUI calls with and without its page."""
    from fastapi import Body, Depends, HTTPException

    def options_route():
        return schema()

    def model_route():
        native, multiple = model.shape() or (0, 0)
        return {"native": native, "multiple": multiple}

    def plan_route(body=Body(default={})):  # noqa: B008 (FastAPI's way); no annotation: the check below is ours
        if not isinstance(body, dict):
            raise HTTPException(422, "The body must be a JSON object of options")
        try:
            return plan(body)
        except InputError as error:
            raise HTTPException(422, str(error)) from error

    for path, route, method in (("options", options_route, "GET"), ("model", model_route, "GET"),
                                ("plan", plan_route, "POST")):
        app.add_api_route(f"/accdiffusion/v1/{path}", route, methods=[method], tags=["AccDiffusion"],
                          dependencies=[Depends(check) for check in _authentication()])


def _authentication() -> list[Any]:
    """The dependencies of routes: what --api-auth asks for."""
    from fastapi import Depends, Header, HTTPException
    from fastapi.security import HTTPBasic
    from modules import shared

    asked = getattr(shared.cmd_opts, "api_auth", None)
    if not asked:
        return []
    users = dict(user.split(":", 1) for user in asked.split(","))

    def check(given=Depends(HTTPBasic(auto_error=False)), key=Header("", alias=PAGE_HEADER)):  # noqa: B008
        known = given is not None and _same(given.password, users.get(given.username, ""))
        if not (known and given.username in users) and not _same(key, PAGE_KEY):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    return [check]


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode(), secret.encode())
