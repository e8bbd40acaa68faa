"""The WebUIs' own ControlNet units, of the embedded model's size: an IP-Adapter's picture without a CLIP; and in
sd-webui-controlnet the ControlNet, whose sizes are fixed there."""
from __future__ import annotations

import contextlib
import os

import tiny_shapes
import torch

PREPROCESSOR = "tiny IP-Adapter"


def embedding(image):
    """What stands for a picture [H, W, 3] of 0 to 255 in place of CLIP's embedding: [1, 8], of its colours."""
    pixels = torch.as_tensor(image)[..., :3].reshape(-1, 3).float() / 127.5 - 1
    return torch.cat([pixels.mean(0), pixels.std(0), torch.ones(2)])[None]


def for_forge():
    from modules_forge.shared import add_supported_preprocessor
    from modules_forge.supported_preprocessor import Preprocessor

    class Colours(Preprocessor):
        def __init__(self):
            super().__init__()
            self.name = PREPROCESSOR

        def __call__(self, input_image, *args, **kwargs):
            found = embedding(input_image)
            return {"clip_vision": None, "image": None, "weight_type": "original", "noise": 0.0,
                    "embeds": torch.stack([found, torch.zeros_like(found)]), "unfold_batch": False}

    add_supported_preprocessor(Colours())
    from lib_ipadapter import IPAdapterPlus

    class Layers(IPAdapterPlus.To_KV):
        """Weights that newer torch can use on a CPU: they are replaced where no inference tensors may be."""

        def __init__(self, *args, **kwargs):
            with torch.inference_mode(False):
                super().__init__(*args, **kwargs)

    IPAdapterPlus.To_KV = Layers


def for_a1111():
    """Where sd-webui-controlnet is there, and has been loaded before."""
    from modules import shared
    from scripts.ipadapter import plugable_ipadapter
    from scripts.supported_preprocessor import Preprocessor

    from scripts import cldm, controlnet_model_guess

    class Colours(Preprocessor):
        def __init__(self):
            super().__init__(name=PREPROCESSOR)
            self.returns_image = False

        def __call__(self, input_image, *args, **kwargs):
            return {"image_embeds": embedding(input_image)}

    Preprocessor.add_supported_preprocessor(Colours())

    class TinyControlModel(cldm.PlugableControlModel):
        def __init__(self, config, state_dict=None):
            folder = os.path.splitext(shared.sd_model.sd_checkpoint_info.filename)[0] + ".files"
            if not os.path.isdir(folder):
                super().__init__(config, state_dict)
                return
            unet = tiny_shapes.read(folder, "unet")
            channels, levels = unet["block_out_channels"], len(unet["block_out_channels"])
            attends = ["CrossAttn" in kind for kind in unet["down_block_types"]]
            depth = tiny_shapes.by_level(unet["transformer_layers_per_block"], levels)
            super().__init__({**config, "model_channels": channels[0],
                              "channel_mult": tiny_shapes.multipliers(channels),
                              "num_res_blocks": unet["layers_per_block"],
                              "attention_resolutions": [2 ** level for level in range(levels) if attends[level]],
                              "transformer_depth": [depth[level] * attends[level] for level in range(levels)],
                              "transformer_depth_middle": depth[-1], "context_dim": unet["cross_attention_dim"],
                              "adm_in_channels": unet["projection_class_embeddings_input_dim"],
                              "use_linear_in_transformer": unet["use_linear_projection"], "num_heads": 1,
                              "num_head_channels": -1})
            tiny_shapes.set_heads(self.control_model, tiny_shapes.heads_of(unet), unet["layers_per_block"])
            hint = self.control_model.input_hint_block
            for number, layer in enumerate(hint):
                if isinstance(layer, torch.nn.Conv2d):
                    wide, narrow = state_dict[f"input_hint_block.{number}.weight"].shape[:2]
                    hint[number] = torch.nn.Conv2d(narrow, wide, 3, layer.stride, 1)
            self.control_model.load_state_dict(state_dict)

        def forward(self, *args, **kwargs):
            """The residuals at the end of as many as SDXL has: they are taken from there."""
            found = super().forward(*args, **kwargs)
            return [torch.zeros(1, 1, 1, 1).to(found[0])] * (10 - len(found)) + found

    controlnet_model_guess.PlugableControlModel = TinyControlModel
    replace = plugable_ipadapter.set_model_attn2_replace

    def replace_where_there_is_one(model, target_cls, function, transformer_id):
        with contextlib.suppress(AttributeError, IndexError):  # a layer that only SDXL has
            replace(model, target_cls, function, transformer_id)

    plugable_ipadapter.set_model_attn2_replace = replace_where_there_is_one
