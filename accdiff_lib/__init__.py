"""AccDiffusion v2 for Stable Diffusion: large pictures from a model as it is, without repeated objects."""

__version__ = "0.1.0"
