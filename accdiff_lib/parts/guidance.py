"""Classifier-free guidance (Ho & Salimans 2022), in one place for all hosts."""

from __future__ import annotations

from torch import Tensor


def guided(cond: Tensor, uncond: Tensor | None, scale: float, rescale: float = 0.0, *,
           combined: Tensor | None = None) -> Tensor:
    """The guided output of the UNet, from its conditional and unconditional one [M, C, h, w] (noise or v, not x0).

    A program that combines them itself hands that in as `combined`; then only what is ours is done to it. So of the
    WebUIs' features these are respected:

    =============  ===========================  ====================================================================
    program        place                        respected
    =============  ===========================  ====================================================================
    command line   here                         -
    A1111          `combine_denoised`           AND with weights; extensions that replace the method of the class;
                                                the callbacks before it (on_cfg_denoised) and after (on_cfg_after_cfg)
    Forge, reForge `sampler_post_cfg_function`  AND with weights; `sampler_cfg_function` (dynamic thresholding); the
                                                functions before ours; after it on_cfg_after_cfg and
                                                reForge's epsilon scaling
    =============  ===========================  ====================================================================

    Not those that an extension ties to a sampler of its own making, whose CFGDenoiser is not the one that evaluates
    windows (dynamic thresholding in A1111).

    Without an unconditional output there is nothing to guide by, and `cond` is returned as it is.
    """
    if combined is None:
        if uncond is None:
            return cond
        combined = uncond + scale * (cond - uncond)
    return rescaled(combined, cond, rescale) if rescale > 0 else combined


def rescaled(output: Tensor, cond: Tensor, mix: float) -> Tensor:
    """Guidance rescale (Lin et al. 2023, section 3.4): the deviation of `cond`, mixed in by `mix`, in each latent."""
    dims = tuple(range(1, output.ndim))
    factor = cond.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True)
    return output * (mix * factor + 1 - mix)
