"""reForge: checkpoints beside which a folder NAME.files lies are built from the diffusers configs in it."""
from __future__ import annotations

import importlib
import os

import tiny_shapes
from ldm_patched.ldm.modules.diffusionmodules import model as vae_model
from ldm_patched.modules import model_base, model_detection, sd1_clip, supported_models
from modules_forge import forge_loader


class _Tiny:
    folder: str

    def __init__(self, unet_config):
        super().__init__(unet_config)
        channels = tiny_shapes.read(self.folder, "unet")["block_out_channels"]
        self.unet_config.update(num_heads=1, num_head_channels=-1, channel_mult=tiny_shapes.multipliers(channels))
        self.latent_format.scale_factor = tiny_shapes.read(self.folder, "vae")["scaling_factor"]

    def get_model(self, state_dict, prefix="", device=None):
        model = super().get_model(state_dict, prefix, device=device)
        config = tiny_shapes.read(self.folder, "unet")
        tiny_shapes.set_heads(model.diffusion_model, tiny_shapes.heads_of(config), config["layers_per_block"])
        tiny_shapes.express(model.diffusion_model, config.get("expressed"))
        if hasattr(model, "embedder"):
            model.embedder = model_base.Timestep(config["addition_time_embed_dim"])
        return model


def _model_config(folder):
    sdxl = os.path.isdir(os.path.join(folder, "text_encoder_2"))
    kind = type("TinySDXL" if sdxl else "TinySD15", (_Tiny, supported_models.SDXL if sdxl else supported_models.SD15),
                {"folder": folder})

    def model_config_from_unet(state_dict, unet_key_prefix, use_base_if_no_match=False, metadata=None):
        return kind(model_detection.detect_unet_config(state_dict, unet_key_prefix, metadata=metadata))

    return model_config_from_unet


def _vae(folder):
    stock = forge_loader.VAE
    config = tiny_shapes.read(folder, "vae")
    channels = config["block_out_channels"]
    params = {"embed_dim": config["latent_channels"], "ddconfig": {
        "double_z": True, "z_channels": config["latent_channels"], "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": channels[0], "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"], "attn_resolutions": [], "dropout": 0.0}}

    def normalize(in_channels, num_groups=None):
        return vae_model.ops.GroupNorm(num_groups=config["norm_num_groups"], num_channels=in_channels, eps=1e-6,
                                       affine=True)

    def vae(sd=None, metadata=None, **kwargs):
        with tiny_shapes.replaced(vae_model, "Normalize", normalize):
            return stock(sd=sd, config={"params": params}, metadata=metadata, **kwargs)

    return vae


def _text_config(folder):
    stock = sd1_clip.CLIPTextConfig

    class Config:
        def __new__(cls, **kwargs):
            return stock(**kwargs)

        @staticmethod
        def from_json_file(path):
            part = "text_encoder_2" if "bigg" in os.path.basename(path) else "text_encoder"
            return stock.from_json_file(os.path.join(folder, part, "config.json"))

    return Config


def _stock_embedder(*, base, embed_dim, text_cfg, mlp_ratio=4.0, quick_gelu=False, **params):
    """reForge makes this one empty (`no_clip`) and fills in its own text encoder."""
    return importlib.import_module(base).FrozenOpenCLIPEmbedder2(arch="ViT-bigG-14", version=None, **params)


_load = forge_loader.load_model_for_a1111


def load_model_for_a1111(timer, checkpoint_info=None, state_dict=None):
    folder = os.path.abspath(os.path.splitext(checkpoint_info.filename)[0] + ".files") if checkpoint_info else ""
    if not os.path.isdir(folder):
        return _load(timer, checkpoint_info=checkpoint_info, state_dict=state_dict)
    with tiny_shapes.replaced(model_detection, "model_config_from_unet", _model_config(folder)), \
            tiny_shapes.replaced(forge_loader, "VAE", _vae(folder)), \
            tiny_shapes.replaced(sd1_clip, "CLIPTextConfig", _text_config(folder)), \
            tiny_shapes.replaced(tiny_shapes, "open_clip_embedder", _stock_embedder):
        return _load(timer, checkpoint_info=checkpoint_info, state_dict=state_dict)


forge_loader.load_model_for_a1111 = load_model_for_a1111
