"""Tests against a RUNNING WebUI with this extension in it: AUTOMATIC1111, Forge or reForge, whichever answers.

    ACCDIFF_WEBUI_URL=http://127.0.0.1:7860 .venv/bin/python -m pytest tests/live -q

Without ACCDIFF_WEBUI_URL all of them are skipped. The WebUI needs `--api`, the extension, and a checkpoint; what a host
lacks (a ControlNet file, sd-webui-controlnet, X/Y/Z, a browser) skips the tests about it, each with its reason. Nothing
is installed or changed there, and settings that a test changes are put back. The tests take turns, also under
`pytest -n`: one lock for each address.

The project was tested with the embedded model: tests/live/checkpoint.py writes it as a checkpoint, and the extension
tests/live/tiny_shape, linked into the WebUI's extensions, teaches the WebUI its shape, and sd-webui-controlnet (linked
as that, or by another name before "tiny_shape") the shape of the ControlNet that --kinds writes in cldm's names.

The extension tests/live/touched, linked likewise, records what AccDiffusion touches in the WebUI meanwhile, or says
what the WebUI lacks of such a record (tests/contract).

What depends on the checkpoint, with values for that model:

    ACCDIFF_WEBUI_BASE=256       width and height of a base picture in pixels: the model's native size
    ACCDIFF_WEBUI_WINDOW=32      the option `window` in latent cells: BASE / 8; 0 takes the checkpoint's own
    ACCDIFF_WEBUI_CONTROLNET=    a canny ControlNet of the checkpoint's family; by default the panel's first
    ACCDIFF_WEBUI_TRAINED=1      0: random weights, whose pictures are not compared by what they show
    ACCDIFF_WEBUI_SECONDS=5      how soon after Interrupt the picture must be there
    ACCDIFF_CHROMIUM=            the browser; by default Debian's chromium
    ACCDIFF_SHOTS=               a folder for the browser's screenshots; by default a temporary one
"""
