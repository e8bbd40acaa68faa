"""modules.sd_samplers: the names in the dropdown, and the samplers behind them."""

from modules import sd_samplers_common

_FUNCTIONS = {"DPM++ 2M": "sample_dpmpp_2m", "Euler a": "sample_euler_ancestral", "Euler": "sample_euler",
              "Heun": "sample_heun", "Euler CFG++": "sample_euler_cfg_pp"}


def visible_sampler_names():
    return list(_FUNCTIONS)


def find_sampler_config(name):
    options = {"second_order": True} if name == "Heun" else {"scheduler": "karras"} if name == "DPM++ 2M" else {}
    return sd_samplers_common.SamplerData(name, None, [], options)


def create_sampler(name, model):
    from modules import sd_samplers_kdiffusion  # with torch

    sampler = sd_samplers_kdiffusion.KDiffusionSampler(_FUNCTIONS[name], model)
    sampler.config = find_sampler_config(name)
    return sampler
