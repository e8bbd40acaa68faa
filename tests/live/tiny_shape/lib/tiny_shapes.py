"""Factories named as `target` in the .yaml of a tiny checkpoint (tests/live/checkpoint.py).

Each returns an instance of the stock class (so that every type check of the WebUI and of extensions sees what it
knows), built in sizes that the stock code has hard-coded otherwise.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import os
from fractions import Fraction

import numpy as np
import torch


class Ratio(Fraction):
    """A channel multiplier that is no whole number: times a number of channels it is a whole one."""

    def __mul__(self, other):
        value = Fraction.__mul__(self, other)
        assert value.denominator == 1, (self, other)
        return int(value)

    __rmul__ = __mul__


def _plain(value):
    """OmegaConf's lists and dicts as Python's."""
    from omegaconf import OmegaConf
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def read(folder, part):
    """The diffusers config of a part of a model."""
    with open(os.path.join(folder, part, "config.json"), encoding="utf-8") as file:
        return json.load(file)


def by_level(value, levels):
    """A config's value of each level, which may be one for all."""
    return [value] * levels if isinstance(value, int) else list(value)


def heads_of(config):
    """Numbers of heads by level of a diffusers UNet config."""
    return by_level(config["num_attention_heads"] or config["attention_head_dim"], len(config["block_out_channels"]))


@contextlib.contextmanager
def replaced(obj, name, value):
    """Within it, the attribute is `value`."""
    before = getattr(obj, name)
    setattr(obj, name, value)
    try:
        yield before
    finally:
        setattr(obj, name, before)


def unet(*, base, channels, heads, layers, expressed=None, **params):
    """`base` is the module of the stock UNetModel; `channels` and `heads` (numbers of heads) are by level."""
    channels, heads = _plain(channels), _plain(heads)
    params = {key: _plain(value) for key, value in params.items()}
    kind = importlib.import_module(base).UNetModel
    model = kind(model_channels=channels[0], channel_mult=multipliers(channels), num_heads=1, num_res_blocks=layers,
                 **params)
    model.num_heads = heads[-1]
    set_heads(model, heads, layers)
    express(model, expressed)
    return model


def express(model, kind):
    """Makes of a UNet that predicts noise one that predicts v: "v" with the noise levels that it was trained with, and
    "zero-snr v" with those of zero terminal SNR, which begin where all is noise.

    Above its own levels a picture is all but noise, whose scale the UNet does not see; there it predicts what it would
    predict at its last level.
    """
    if kind is None:
        return
    stock = type(model)
    alphas = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0)
    own = levels = ((1 - alphas) / alphas) ** 0.5
    if kind == "zero-snr v":
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 4.8973451890853435e-08
        levels = ((1 - alphas) / alphas) ** 0.5

    def forward(self, x, timesteps=None, *args, **kwargs):
        sigma = torch.as_tensor(np.exp(np.interp(timesteps.cpu().double(), np.arange(1000), levels.log())))
        known = sigma.clamp(max=float(own[-1]))
        at = torch.as_tensor(np.interp(known.log(), own.log(), np.arange(1000))).to(timesteps.device, torch.float32)
        noise = stock.forward(self, x, at, *args, **kwargs).double()
        sigma, known = (each.to(x.device)[:, None, None, None] for each in (sigma, known))
        x0 = x.double() * (known ** 2 + 1) ** 0.5 - known * noise
        whole = (sigma ** 2 + 1) ** 0.5
        return ((x.double() / whole - x0) * whole / sigma).to(x.dtype)

    # No attribute of the object, which is what extensions set.
    model.__class__ = type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})


def multipliers(channels):
    """The channel_mult of levels with these channels."""
    return [c // channels[0] if c % channels[0] == 0 else Ratio(c, channels[0]) for c in channels]


def set_heads(model, heads, layers):
    """Gives a UNet with ldm's block names its numbers of heads by level (the weights' shapes do not depend on them)."""
    levels = len(heads)
    for name, module in model.named_modules():
        place = name.split(".")
        if place[0] not in ("input_blocks", "output_blocks", "middle_block") or len(place) < 2:
            continue
        level = {"input_blocks": lambda i: (i - 1) // (layers + 1),
                 "output_blocks": lambda i: levels - 1 - i // (layers + 1),
                 "middle_block": lambda i: levels - 1}[place[0]](int(place[1]))
        if name.endswith((".attn1", ".attn2")):
            head = module.to_q.weight.shape[0] // heads[level]
            module.heads = heads[level]
            if hasattr(module, "scale"):
                module.scale = head ** -0.5
            if hasattr(module, "dim_head"):
                module.dim_head = head
        elif hasattr(module, "attn2") and hasattr(module, "n_heads"):
            module.n_heads = heads[level]
            module.d_head = module.attn2.to_q.weight.shape[0] // heads[level]


def vae(*, base, groups, model_module, **params):
    """`base` is the stock class of the VAE, `groups` its norms' number of groups (32 in the stock code)."""
    module, name = base.rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)

    def normalize(in_channels, num_groups=None):
        return torch.nn.GroupNorm(num_groups=groups, num_channels=in_channels, eps=1e-6, affine=True)

    with replaced(importlib.import_module(model_module), "Normalize", normalize):
        return kind(**params)


def open_clip_embedder(*, base, embed_dim, text_cfg, mlp_ratio=4.0, quick_gelu=False, **params):
    """The stock FrozenOpenCLIPEmbedder2 (module `base`) around a small text tower."""
    import open_clip
    import open_clip.model
    from open_clip import transformer as oct

    module = importlib.import_module(base)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}  # deleted at once

    def create(arch, *args, **kwargs):
        block = oct.ResidualAttentionBlock
        init = block.__init__

        def with_ratio(self, d_model, n_head, *a, **k):
            k.pop("mlp_ratio", None)
            init(self, d_model, n_head, *a[1:], mlp_ratio=mlp_ratio, **k)

        with replaced(block, "__init__", with_ratio):
            model = open_clip.model.CLIP(embed_dim=embed_dim, vision_cfg=vision, text_cfg=_plain(text_cfg),
                                         quick_gelu=quick_gelu)
        return model, None, None

    with replaced(module.open_clip, "create_model_and_transforms", create):
        return module.FrozenOpenCLIPEmbedder2(arch="tiny", version=None, **params)
