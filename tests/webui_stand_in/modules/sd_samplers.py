"""modules.sd_samplers: the names in the dropdown."""


def visible_sampler_names():
    return ["DPM++ 2M", "Euler a", "Euler", "Heun"]
