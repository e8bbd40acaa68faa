"""A ControlNet of our own for the UNet of A1111, which brings none: one file in, residuals into the UNet by hooks.

    controlnet = LdmControlNet.load(path, unet, dtype=..., device=...)
    with controlnet.attached(unet):
        controlnet.set(hint, strength, images)   # before every evaluation of the model
        ...                                      # whatever calls unet(x, timesteps=, context=, y=)

The encoder is rebuilt from the loaded UNet's own block classes without their weights, so the host's attention
optimisation works in it too, and no config file is needed. The UNet is only ever hooked: no class, module, method or
attribute of it is changed, so other programs that replace its `forward` (sd-webui-controlnet) keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from accdiff_lib.parts.checkpoint import fill
from accdiff_lib.parts.noise_levels import timestep_embedding
from accdiff_lib.parts.union_control import UnionHint, own_weights, time_offset
from accdiff_lib.parts.weight_names import Place
from accdiff_lib.webui.hosts.ldm.controlnet_file import FIRST, ControlNetFile, GivenControlNet, check_family

#: Which image each entry of a UNet batch belongs to: see `LdmControlNet.set`.
Images = Sequence[int] | Callable[[int], Sequence[int]]

_ENCODER = ("time_embed", "label_emb", "input_blocks", "middle_block")
#: What LoRA loaders leave on the UNet's layers; a layer with it would get the LoRA's weights, or the UNet's own back.
OF_LORA_LOADERS = ("network_", "lyco_")


class LdmControlNet:
    """A loaded ControlNet, and what it shall do at the UNet it is attached to."""

    def __init__(self, encoder: Encoder, path: Path, shape: Any) -> None:
        """See `load`; `shape` is what `fits` compares."""
        self.path = path
        self._encoder = encoder
        self._shape = shape
        self._handles: list[Any] = []
        self._strength = 0.0
        self._count = 0
        self._images: Images = []
        self._next = 0
        self._hint: Tensor | None = None  # [M, 3, 8h, 8w] until the first model call has made the next of it
        self._guidance: Tensor | None = None  # [M, C, h, w]: the hint after its convolutions
        self._residuals: list[Tensor] = []  # of the running UNet call, one for each output block in running order
        self._middle: Tensor | None = None
        self._taken: set[int] = set()

    @classmethod
    def load(cls, path: str | Path, unet: nn.Module, *, dtype: torch.dtype,
             device: torch.device | str) -> LdmControlNet:
        """Loads a ControlNet file (cldm's or diffusers' names; .safetensors, or .pth and the like) for this UNet.

        `unet` is the WebUI's `UNetModel` (sgm's or ldm's); its structure is read, its weights are neither shared nor
        changed. Files with less attention than the UNet ("mid" and "small" SDXL ControlNets) work too. Raises
        InputError (one line: file, reason) for whatever cannot steer this UNet.
        """
        path = Path(path)
        if not all(hasattr(unet, part) for part in ("time_embed", "input_blocks", "middle_block", "output_blocks")):
            raise GivenControlNet(path).error("the loaded model is none of SDXL, SD1.5 and SD2")
        file = ControlNetFile(path)
        by_name = file.names(layers_per_level(unet))
        check_family(file, by_name, unet)
        shapes = {name: file.shapes[file.prefix + key] for name, key in by_name.items()}
        encoder = Encoder(unet, shapes)
        places = {name: Place(by_name.get(name, name)) for name in encoder.state_dict()}
        fill(encoder, file, places, file.prefix, what="the ControlNet", dtype=dtype, device=device, closed=True)
        encoder.unite(file)
        file.close()
        return cls(encoder, path, _shape(unet))

    def fits(self, unet: nn.Module) -> bool:
        """True if a UNet (another checkpoint's, perhaps) has the structure this ControlNet was loaded for."""
        return self._shape == _shape(unet)

    @property
    def dtype(self) -> torch.dtype:
        return self._encoder.dtype

    @property
    def device(self) -> torch.device:
        return self._encoder.device

    def to(self, device: torch.device | str) -> LdmControlNet:
        """Moves the weights (to the CPU and back, between stages). It must be on the UNet's device while it runs."""
        self._encoder.to(device)
        return self

    @property
    def network(self) -> nn.Module:
        """The network itself, for a host that manages where weights lie."""
        return self._encoder

    def residuals(self, hint: Tensor, images: Sequence[int], x: Tensor, timesteps: Tensor, context: Tensor,
                  y: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Residuals of the input blocks' outputs and of the middle, for a host that adds them by itself.

        `hint` [M, 3, 8h, 8w] in 0..1; `images` says to which of them each entry of `x` belongs; the rest is what the
        UNet is called with.
        """
        guidance = self._encoder.guidance(hint)
        *down, middle = self._encoder(x, timesteps, context, y, guidance[torch.tensor(images, device=guidance.device)])
        return down, middle

    def set(self, hint: Tensor, strength: float = 1.0, images: Images | None = None) -> None:
        """What the UNet's next calls are steered by: hints [M, 3, 8h, 8w] in 0..1 and the factor on all residuals.

        A model evaluation of M images is one or several UNet calls whose batches hold their conditional and
        unconditional halves; `images` says which image (0..M-1) each entry of the batches belongs to:

        * None: every call goes through the images in turn, as many times as its batch holds them (cond, then uncond);
        * a sequence: the images of all entries of one evaluation, in the order in which they come, whatever batches
          they come in: with prompts joined by AND, [0, 0, 1] + [0, 1] is two conditional halves of image 0, one of
          image 1, and the unconditional ones. After the last it begins again;
        * a function of the batch's size, called once a UNet call.

        Call it before every evaluation: it goes back to the first entry. Raises ValueError for a hint of another form.
        """
        if hint.ndim != 4 or hint.shape[1] != 3 or not len(hint):
            raise ValueError(f"a ControlNet hint is [M, 3, 8h, 8w], not {list(hint.shape)}")
        self.clear()
        self._hint, self._strength, self._count = hint, float(strength), len(hint)
        self._images = range(len(hint)) if images is None else images

    def clear(self) -> None:
        """Steers nothing from the next UNet call on, and frees what the last ones needed."""
        self._hint = self._guidance = None
        self._strength, self._count, self._images, self._next = 0.0, 0, [], 0
        self._drop()

    @contextmanager
    def attached(self, unet: nn.Module) -> Iterator[LdmControlNet]:
        """Within it, every call of this UNet gets what `set` said last; nothing at all before the first `set`.

        At the end, however it comes, all hooks are gone and the hint is forgotten. Raises as `attach`.
        """
        self.attach(unet)
        try:
            yield self
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self.clear()

    def attach(self, unet: nn.Module) -> None:
        """The same for as long as the UNet is there. Raises RuntimeError when it is attached already, ValueError for a
        UNet that it was not loaded for."""
        if self._handles:
            raise RuntimeError("this ControlNet is attached already")
        if not self.fits(unet):
            raise ValueError(f"{self.path.name} was loaded for a UNet of another structure")
        parts: Any = unet
        keep = self._handles.append
        keep(unet.register_forward_pre_hook(self._before, with_kwargs=True))
        # Also after an error: residuals must not lie in memory while a host makes room and tries again.
        keep(unet.register_forward_hook(self._after, always_call=True))
        keep(parts.middle_block.register_forward_hook(self._into_middle))
        for index, block in enumerate(parts.output_blocks):
            keep(block.register_forward_pre_hook(partial(self._into_skip, index)))

    def steered(self, forward: Callable[..., Tensor], args: tuple, kwargs: Mapping[str, Any], hint: Tensor,
                strength: float, images: Sequence[int]) -> Tensor:
        """What `forward(*args, **kwargs)` gives, which is that of the UNet it is attached to, by itself: without the
        hooks that a call of the UNet has around it. The rest is as in `set`."""
        self.set(hint, strength, images)
        try:
            self._before(None, args, kwargs)
            output = forward(*args, **kwargs)
            self._after(None, args, output)
            return output
        finally:
            self.clear()

    def on(self, encoder: Encoder) -> LdmControlNet:
        """The same with a copy of its network."""
        return LdmControlNet(encoder, self.path, self._shape)

    @property
    def hooks(self) -> Collection[int]:
        """The ids of its hooks on the UNet."""
        return [handle.id for handle in self._handles]

    # --------------------------------------------------------------------------------------------- hooks

    def _before(self, unet: nn.Module | None, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The UNet is about to run: runs the encoder on the same inputs."""
        self._drop()
        if self._strength == 0:
            return
        given = {**dict(zip(("x", "timesteps", "context", "y"), args, strict=False)), **kwargs}
        with torch.no_grad():
            if self._guidance is None:
                assert self._hint is not None
                self._guidance = self._encoder.guidance(self._hint)
                self._hint = None
            x = given["x"]
            if self._guidance.shape[2:] != x.shape[2:]:
                raise ValueError(f"the ControlNet's hint is for latents of {list(self._guidance.shape[2:])} cells, "
                                 f"the UNet was called with {list(x.shape[2:])}")
            images = torch.tensor(self._images_of(len(x)), device=self._guidance.device)
            *down, middle = self._encoder(x, given["timesteps"], _text(given.get("context")), given.get("y"),
                                          self._guidance[images])
            self._middle = middle.mul_(self._strength)
            self._residuals = [residual.mul_(self._strength) for residual in reversed(down)]

    def _images_of(self, batch: int) -> list[int]:
        """The image of each entry of the next UNet batch. Raises RuntimeError if they cannot be told apart."""
        if callable(self._images):
            images = list(self._images(batch))
        else:
            total, begin = len(self._images), self._next
            # A batch that begins in the midst of one evaluation and ends in another is not the model call that
            # `images` was made for; a guess would mix them up without any error.
            if batch > total - begin and (begin or not total or batch % total):
                raise RuntimeError(f"the UNet was called with a batch of {batch} where {total - begin} of {total} were "
                                   "left")
            images = [self._images[(begin + entry) % total] for entry in range(batch)]
            self._next = (begin + batch) % total
        if len(images) != batch or not set(images) <= set(range(self._count)):
            raise RuntimeError(f"the UNet was called with a batch of {batch}, said to belong to images {images} of "
                               f"{self._count}")
        return images

    def _into_middle(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._middle is None or output.shape != self._middle.shape:
            return None
        self._taken.add(-1)
        return output + self._middle.to(output)

    def _into_skip(self, index: int, block: nn.Module, args: tuple) -> None:
        """An output block is about to run on cat([h, skip]): adds to the skip's channels, which are the last."""
        if not self._residuals:
            return
        residual = self._residuals[index]
        skip = args[0][:, -residual.shape[1]:]
        # Within one call sd-webui-controlnet may run the blocks on a reference picture first, of any size.
        if skip.shape == residual.shape:
            skip += residual.to(skip)  # in place: the UNet has just made this tensor
            self._taken.add(index)

    def _after(self, unet: nn.Module | None, args: tuple, output: Tensor | None) -> None:
        """The UNet has run, or failed (then the output is None)."""
        missing = set(range(-1, len(self._residuals))) - self._taken if self._middle is not None else set()
        self._drop()
        if output is not None and missing:
            raise RuntimeError(f"{len(missing)} blocks of the UNet did not take the ControlNet's residuals: it was "
                               "replaced by another extension")

    def _drop(self) -> None:
        """Forgets the residuals of a UNet call."""
        self._residuals, self._middle, self._taken = [], None, set()


def _text(context: Tensor | None) -> Tensor | None:
    """The text [B, 77k, C] without the marker that sd-webui-controlnet puts before it."""
    return context[:, 1:] if context is not None and context.shape[1] % 77 == 1 else context


# ----------------------------------------------------------------------------------------------- network

class Encoder(nn.Module):
    """The ControlNet itself: the UNet's encoder and middle, the hint's convolutions and the zero convolutions.

    Its weights have cldm's names, and lie on the meta device until they are filled.
    """

    def __init__(self, unet: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` are those of the file's tensors by cldm's names."""
        super().__init__()
        for name in _ENCODER:
            if hasattr(unet, name):
                setattr(self, name, _without_weights(getattr(unet, name)))
        _cut_attention(self, "", shapes)
        parts: Any = self
        if not any(name.startswith("middle_block.2.") for name in shapes):
            parts.middle_block[2] = nn.Identity()  # a middle without attention has one residual block
        first = parts.input_blocks[0][0]
        first.in_channels = shapes.get(FIRST, first.weight.shape)[1]  # an inpainting model's UNet takes more
        first.weight = nn.Parameter(first.weight[:, :first.in_channels].clone(), requires_grad=False)
        widths = [_width(block) for block in parts.input_blocks]
        with torch.device("meta"):
            self.input_hint_block: nn.Module = _hint_block(shapes)
            self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1)) for width in widths)
            self.middle_block_out = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 1))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.middle_block_out.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.middle_block_out.parameters()).device

    def unite(self, file: ControlNetFile) -> None:
        """Takes what a union ControlNet has besides."""
        with file.given.complete():
            own = own_weights(file.shapes, file.prefix, file.read)
            if own:
                parts: Any = self
                parts.time_embed[2].bias.data += time_offset(own).to(self.device, self.dtype)
                parts.input_hint_block = UnionHint(self.input_hint_block, own).to(self.device, self.dtype)

    def guidance(self, hint: Tensor) -> Tensor:
        """What is added to the first features [M, C, h, w], from the hint [M, 3, 8h, 8w] in 0..1."""
        features: Tensor = self.input_hint_block(hint.to(self.device, self.dtype))
        return features

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None, y: Tensor | None,
                guidance: Tensor) -> list[Tensor]:
        """The residuals of each input block's output, and of the middle block's.

        `x` [B, 4, h, w] (or more channels), `timesteps` [B], `context` [B, 77k, C], `y` [B, A] (SDXL) as the UNet gets
        them; `guidance` [B, C, h, w].
        """
        parts: Any = self
        x, timesteps = x.to(self.device, self.dtype), timesteps.to(self.device)
        context = None if context is None else context.to(self.device, self.dtype)
        emb = parts.time_embed(timestep_embedding(timesteps, parts.time_embed[0].in_features).to(self.dtype))
        if hasattr(self, "label_emb"):
            assert y is not None, "SDXL's UNet was called without its size vector"
            emb = emb + parts.label_emb(y.to(self.device, self.dtype))
        residuals, h = [], x[:, :parts.input_blocks[0][0].in_channels]
        for index, (block, zero) in enumerate(zip(parts.input_blocks, self.zero_convs, strict=True)):
            h = block(h, emb, context)
            if index == 0:
                h = h + guidance.to(h)
            residuals.append(zero(h))
        return [*residuals, self.middle_block_out(parts.middle_block(h, emb, context))]


def _hint_block(shapes: Mapping[str, tuple[int, ...]]) -> nn.Sequential:
    """Convolutions with an activation between two; every second from the third on halves the picture's sides."""
    layers: list[nn.Module] = []
    while (shape := shapes.get(f"input_hint_block.{len(layers) + bool(layers)}.weight")) and len(shape) == 4:
        if layers:
            layers.append(nn.SiLU())
        number = len(layers) // 2
        last = f"input_hint_block.{len(layers) + 2}.weight" not in shapes
        stride = 2 if number and number % 2 == 0 and not last else 1
        layers.append(nn.Conv2d(shape[1], shape[0], shape[2:], stride, padding=(shape[2] // 2, shape[3] // 2)))
    return nn.Sequential(*layers)


def _without_weights(module: nn.Module) -> Any:
    """The same layer with weights of its own, on the meta device, and without anything others have put on it.

    `copy.deepcopy` would take along hooks (of --medvram, say), replaced methods, the marks of LoRA loaders and the
    runtime classes of token merging: all of that is about the UNet, and may be gone before this copy is.
    """
    kind: Any = type(module)
    while "<locals>" in kind.__qualname__ and kind.__base__ is not nn.Module:
        kind = kind.__base__  # a class made at runtime, as token merging derives from the host's
    bare = kind.__new__(kind)
    nn.Module.__init__(bare)
    for name, value in vars(module).items():
        # A method that lies on the object is somebody's wrapper, or the original that he put aside.
        method = isinstance(value, MethodType) or (callable(value) and hasattr(kind, name))
        if name not in vars(bare) and not (method or isinstance(value, Tensor) or name.startswith(OF_LORA_LOADERS)):
            setattr(bare, name, value)
    for name, weight in module.named_parameters(recurse=False):
        bare.register_parameter(name, nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False))
    for name, child in module.named_children():
        bare.add_module(name, _without_weights(child))
    for name in set(module._parameters) - set(bare._parameters):
        bare.register_parameter(name, None)  # a layer without a bias
    if isinstance(module, nn.Conv2d):
        bare.padding_mode = "zeros"  # not what the WebUI's "Tiling" has just set: windows do not wrap around
    return bare


def _cut_attention(module: nn.Module, prefix: str, names: Collection[str]) -> None:
    """Leaves out the transformers, and the blocks of them, that the file does not have (names as in cldm)."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        blocks: Any = getattr(child, "transformer_blocks", None)
        if blocks is None:
            _cut_attention(child, path, names)
        elif not any(key.startswith(path) for key in names):
            setattr(module, name, nn.Identity())
        else:
            while len(blocks) and not any(key.startswith(f"{path}transformer_blocks.{len(blocks) - 1}.")
                                          for key in names):
                del blocks[-1]


def _width(block: nn.Module) -> int:
    """Channels that an input block puts out: its last weight makes them."""
    return [weight.shape[0] for weight in block.parameters() if weight.ndim > 1][-1]


def layers_per_level(unet: nn.Module) -> int:
    """Resnets in each level of the encoder: the blocks between the first convolution and the first downsampling."""
    parts: Any = unet
    downs = [index for index, block in enumerate(parts.input_blocks) if hasattr(block[0], "op")]
    return downs[0] - 1 if downs else len(parts.input_blocks) - 1


def _shape(unet: nn.Module) -> tuple:
    """What a ControlNet depends on: names and shapes of the encoder's weights, heads of its attention."""
    shapes = tuple((name, tuple(weight.shape)) for name, weight in unet.named_parameters()
                   if name.startswith(_ENCODER))
    heads = tuple((name, getattr(module, "heads", None)) for name, module in unet.named_modules()
                  if name.startswith(_ENCODER) and hasattr(module, "heads"))
    return shapes, heads
