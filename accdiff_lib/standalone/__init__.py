"""The host on diffusers: model files, text, samplers, memory."""
