"""What of a WebUI this project's code touches, read from its source: names, and the calls that it makes of them.

Imports of the WebUI tell most of it. Objects that the WebUI hands in have no import; `OBJECTS` says how our files call
them, `MEMBERS` what hangs on them, and `CLASSES` what they are in each WebUI. A use is "modules.shared.state" or
"p.width", the first part of the latter being an object.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("a1111", "forge", "reforge")
#: Packages of the WebUIs.
PACKAGES = ("modules", "modules_forge", "backend", "ldm_patched")

#: What each object is: the classes that it may be of, and functions that set attributes of it; any has what we use.
_PROCESSING = tuple(f"modules.processing.StableDiffusionProcessing{kind}" for kind in ("", "Txt2Img", "Img2Img"))
_COMMON: dict[str, tuple[str, ...]] = {
    "p": _PROCESSING, "processed": ("modules.processing.Processed",), "runner": ("modules.scripts.ScriptRunner",),
    "script": ("modules.scripts.Script",), "params": ("modules.script_callbacks.CFGDenoiserParams",),
    "denoiser": ("modules.sd_samplers_cfg_denoiser.CFGDenoiser",),
    "sampler": ("modules.sd_samplers_kdiffusion.KDiffusionSampler", "modules.sd_samplers_timesteps.CompVisSampler"),
    "sampler data": ("modules.sd_samplers_common.SamplerData",), "schedule": ("modules.sd_schedulers.Scheduler",),
    "multicond": ("modules.prompt_parser.MulticondLearnedConditioning",),
    "part": ("modules.prompt_parser.ComposableScheduledPromptConditioning",),
    "scheduled": ("modules.prompt_parser.ScheduledPromptConditioning",),
    "size embedder": ("sgm.modules.encoders.modules.ConcatTimestepEmbedderND",)}
_LDM = {"model": ("modules.sd_models_types.WebuiSdModel", "sgm.models.diffusion.DiffusionEngine",
                  "ldm.models.diffusion.ddpm.DDPM", "modules.sd_models_xl.extend_sdxl",
                  "modules.sd_models.load_model_weights", "modules_forge.forge_loader.load_model_for_a1111",
                  "modules.processing.process_images_inner"),
        "wrapper": ("ldm.models.diffusion.ddpm.DiffusionWrapper",),
        "vae": ("ldm.models.autoencoder.AutoencoderKL",),
        "decoder": ("ldm.modules.diffusionmodules.model.Decoder",)}
_FORGE = {"forge objects": ("backend.diffusion_engine.base.ForgeObjects",),
          "patcher": ("backend.patcher.unet.UnetPatcher",), "inner model": ("backend.modules.k_model.KModel",),
          "sampling": ("backend.modules.k_prediction.Prediction",), "vae patcher": ("backend.patcher.vae.VAE",)}
_REFORGE = {"forge objects": ("modules_forge.forge_loader.ForgeSD",),
            "patcher": ("ldm_patched.modules.model_patcher.ModelPatcher",
                        "modules_forge.unet_patcher.UnetPatcher"),
            "inner model": ("ldm_patched.modules.model_base.BaseModel",),
            "sampling": ("ldm_patched.modules.model_sampling.ModelSamplingDiscrete",
                         "ldm_patched.modules.model_sampling.EPS"),
            "vae patcher": ("ldm_patched.modules.sd.VAE",)}
_ENCODER = {"encoder": ("modules.sd_hijack_clip.TextConditionalModel",
                        "modules.sd_hijack_clip.FrozenCLIPEmbedderWithCustomWordsBase"),
            "chunk": ("modules.sd_hijack_clip.PromptChunk",), "fix": ("modules.sd_hijack_clip.PromptChunkFix",),
            "embedding": ("modules.textual_inversion.textual_inversion.Embedding",)}
CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "a1111": {**_COMMON, **_LDM, **_ENCODER, "unet": ("ldm.modules.diffusionmodules.openaimodel.UNetModel",)},
    "forge": {**_COMMON, **_FORGE, "unet": ("backend.nn.unet.IntegratedUNet2DConditionModel",),
              "model": ("backend.diffusion_engine.sdxl.StableDiffusionXL",
                        "backend.diffusion_engine.sd15.StableDiffusion",
                        "modules.sd_samplers_timesteps.CompVisTimestepsDenoiser.__init__"),
              "encoder": ("backend.text_processing.classic_engine.ClassicTextProcessingEngine",),
              "chunk": ("backend.text_processing.classic_engine.PromptChunk",),
              "fix": ("backend.text_processing.textual_inversion.TextualInversionFix",
                      "backend.text_processing.classic_engine.PromptChunkFix"),
              "embedding": ("backend.text_processing.textual_inversion.Embedding",)},
    "reforge": {**_COMMON, **_LDM, **_ENCODER, **_REFORGE,
                "unet": ("ldm_patched.ldm.modules.diffusionmodules.openaimodel.UNetModel",)}}

#: The class of an object's attribute, and of a module's.
MEMBERS: dict[str, str] = {
    "p.sd_model": "model", "p.scripts": "runner", "p.sampler": "sampler", "sampler.model_wrap_cfg": "denoiser",
    "sampler.config": "sampler data", "params.denoiser": "denoiser", "denoiser.p": "p", "model.model": "wrapper",
    "wrapper.diffusion_model": "unet", "model.first_stage_model": "vae", "vae.decoder": "decoder",
    "model.forge_objects": "forge objects", "model.forge_objects_after_applying_lora": "forge objects",
    "forge objects.unet": "patcher", "forge objects.vae": "vae patcher", "patcher.model": "inner model",
    "inner model.diffusion_model": "unet", "inner model.predictor": "sampling",
    "inner model.model_sampling": "sampling", "fix.embedding": "embedding"}

#: How our files call objects that they are given; "*" are all files.
OBJECTS: dict[str, dict[str, str]] = {
    "*": {"p": "p", "_p": "p", "self._p": "p", "sd_model": "model", "script": "script"},
    "run": {"processed": "processed"}, "extras": {"processed": "processed"},
    "a1111": {"params": "params", "self._denoiser": "denoiser", "unet": "unet"}, "rows": {"params": "params"},
    "samplers": {"view": "p", "self._view": "p", "sampler": "sampler", "self._sampler": "sampler"},
    "windows": {"sampler": "sampler", "self._denoiser": "denoiser", "self._view": "p",
                      "unet": "unet"},
    "text": {"self._model": "model", "embedder": "encoder", "chunk": "chunk", "fix": "fix",
                   "embedding": "embedding", "multi": "multicond", "part": "part"},
    "forge_base": {"self._vae_patcher": "vae patcher", "patcher": "patcher", "self.patcher": "patcher",
                    "unet": "patcher", "sampling": "sampling"},
    "forge_control": {"unet": "patcher", "self._sampling": "sampling"},
    "forge": {"unet": "patcher"}, "reforge": {"unet": "patcher"},
    "unet": {"unet": "unet"}, "model": {"model": "model"}, "panel": {"scheduler": "schedule"}}
#: In these functions a spelling of above is something else.
ELSEWHERE = {("forge_base", "base"): {"unet": "unet"}, ("forge_base", "__init__"): {"unet": ""},
             ("text", "place"): {"embedder": "size embedder"}}
#: What the files for all WebUIs touch, and this one's adapter does otherwise.
REPLACED: dict[str, set[str]] = {
    "a1111": set(), "reforge": set(),
    "forge": {"encoder.input_key", "encoder.wrapped", "model.conditioner", "model.cond_stage_model",
              "size embedder.forward", "size embedder.input_key", "size embedder.outdim"}}


@dataclass(frozen=True)
class Call:
    """A call of a name: how many values by position, and the names of the others."""

    name: str
    positional: int
    keywords: tuple[str, ...]
    where: str


@dataclass
class Uses:
    """What some files touch. `optional` are names that they look for and can do without."""

    names: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    #: Methods of ours that the WebUI calls: parameters by their names in the WebUI.
    overridden: dict[str, ast.arguments] = field(default_factory=dict)


def files(host: str) -> list[Path]:
    """Our files that run in a WebUI."""
    own = [host, *(["a1111_lowvram", "ldm/rows", "ldm/unet"] if host == "a1111" else [])]
    if host != "a1111":
        own += ["forge_base", "forge_control", "ldm/unet"]
    webui = ROOT / "accdiff_lib" / "webui"
    names = [*own, "webui", "samplers", "text", "windows"]
    return [ROOT / "scripts" / "accdiff.py", *sorted(webui.glob("*.py")), *sorted((webui / "ui").glob("*.py")),
            *(webui / "hosts" / f"{name}.py" for name in sorted(names))]


def uses(host: str) -> Uses:
    """What our code touches in this WebUI."""
    found = Uses()
    for path in files(host):
        _Reader(path, found).visit(ast.parse(path.read_text(encoding="utf-8")))
    found.names -= REPLACED[host]
    found.optional -= found.names | REPLACED[host]
    found.calls = [call for call in found.calls if call.name not in REPLACED[host]]
    return found


class _Reader(ast.NodeVisitor):
    """Reads one file. `_known` maps our spellings to what they are."""

    def __init__(self, path: Path, found: Uses) -> None:
        self._stem, self._found = path.stem, found
        self._known: dict[str, str] = {**OBJECTS["*"], **OBJECTS.get(path.stem, {})}
        self._sought: set[str] = set()  # what the function that is being read looks for by `hasattr`

    # --- scopes and aliases ----------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, sought = dict(self._known), self._sought
        self._sought = sought | {ast.unparse(each.args[0]) + "." + str(ast.literal_eval(each.args[1]))
                                 for each in ast.walk(node) if isinstance(each, ast.Call) and len(each.args) > 1
                                 and ast.unparse(each.func) == "hasattr" and isinstance(each.args[1], ast.Constant)}
        self._known.update(ELSEWHERE.get((self._stem, node.name), {}))
        self.generic_visit(node)
        members = {name: value for name, value in self._known.items() if name.startswith("self.")}
        self._known, self._sought = {**before, **members}, sought

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self._name(base) for base in node.bases]
        if "modules.scripts.Script" in bases:
            self._known["self"] = "script"
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    self._found.names.add(f"script.{method.name}")
                    self._found.overridden[f"script.{method.name}"] = method.args
        self.generic_visit(node)
        self._known.pop("self", None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.partition(".")[0] in PACKAGES:
            for each in node.names:
                self._known[each.asname or each.name] = f"{node.module}.{each.name}"
                self._found.names.add(f"{node.module}.{each.name}")

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = zip(target.elts, node.value.elts, strict=False) if (
                isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)) else [(target, node.value)]
            for to, value in pairs:
                name = self._name(value)
                if name and (isinstance(to, ast.Name) or ast.unparse(to).startswith("self.")):
                    self._known[ast.unparse(to)] = MEMBERS.get(name, name)

    # --- uses ------------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._name(node)
        if name is None or ast.unparse(node) in self._sought or not self._add(name):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._name(node.func)
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        constants = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        if function in ("getattr", "hasattr", "setattr", "delattr") and constants:
            name = self._below(self._name(node.args[0]), constants[0])
            if name:
                self._add(name, self._found.optional)
        elif function in ("lacking", "_has"):
            self._found.optional.update(constants)
        elif name and ("." in name or name in _COMMON):
            name = name if "." in name else f"{name}.forward"  # a network
            self._add(name)
            given = (*node.args, *(each.value for each in node.keywords if each.arg is None))
            if all(each.arg for each in node.keywords) and not any(isinstance(each, ast.Starred) for each in given):
                self._found.calls.append(Call(name, len(node.args), tuple(each.arg or "" for each in node.keywords),
                                              f"{self._stem}.py:{node.lineno}"))
        self.generic_visit(node)

    def _add(self, name: str, where: set[str] | None = None) -> bool:
        head, _, attribute = name.rpartition(".")
        if not head or attribute.startswith("_"):
            return False
        if head == "unet" and hasattr(nn.Module, attribute):
            return True
        (self._found.names if where is None else where).add(name)
        return True

    def _name(self, node: ast.AST) -> str | None:
        """What an expression is: "modules.x.y", an object's name, or "object.attribute"."""
        spelled = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
        if spelled in self._known:
            return self._known[spelled] or None
        if not isinstance(node, ast.Attribute):
            return None
        return self._below(self._name(node.value), node.attr)

    def _below(self, owner: str | None, attribute: str) -> str | None:
        """The name of an attribute of what has the name `owner`."""
        if owner is None:
            return None
        if "." in owner and owner.partition(".")[0] not in PACKAGES:  # itself an attribute of an object
            if owner not in MEMBERS:
                return None
            self._add(owner)
            owner = MEMBERS[owner]
        return f"{owner}.{attribute}"
