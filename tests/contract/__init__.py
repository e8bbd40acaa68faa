"""What our code touches in each WebUI, recorded in the running WebUI: names, calls and signatures, no code.

`touched` records, `check` says what another WebUI lacks of a record; tests/webui/test_contract.py needs no WebUI.

A record is made anew when our code uses a new name: link tests/live/touched into the WebUI's extensions, start it with
ACCDIFF_TOUCHED=/.../tests/contract/a1111.json and its setting "samples_save" on, and run against it

    pytest tests/live/test_txt2img.py tests/live/test_api.py tests/live/test_stop.py \\
        -k "not every_sampler or DDIM or UniPC or Restart or SDE]"

Recorded: AUTOMATIC1111 9f5a98d5 (dev, 2024-07-20), Forge dfdcbab6, reForge main 3b56b268.
"""
