"""modules.sd_unet: what the setting SD Unet puts in place of the checkpoint's."""

current_unet = None
