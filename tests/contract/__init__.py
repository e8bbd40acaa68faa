"""How the records of what our code touches in each WebUI are made, in the running WebUI: names, calls and signatures,
no code. accdiff_lib/webui/hosts/contract.py reads them; tests/webui/test_contract.py needs no WebUI.

A record is made anew when our code uses a new name: link tests/live/touched into the WebUI's extensions, start it with
ACCDIFF_TOUCHED=/.../accdiff_lib/webui/hosts/contracts/a1111.json and its setting "samples_save" on, and run against it

    pytest tests/live/test_txt2img.py tests/live/test_api.py tests/live/test_stop.py \\
        -k "not every_sampler or DDIM or UniPC or Restart or SDE]"

Recorded: AUTOMATIC1111 9f5a98d5 (dev, 2024-07-20), Forge dfdcbab6, reForge main 3b56b268.
"""
