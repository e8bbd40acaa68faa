"""Photographs: those parts of the engine that need no trained text model, `python -m testbed.photographs`.

`shipped` has the photographs, `ncnn` runs ESRGAN, `enlarging` makes what is compared and measures it.
"""
