"""A stand-in of the WebUI's `modules`: only what the extension touches, only as much as it does.

What has a name without an underscore is A1111's, with its parameters (tests/webui/test_contract.py). Modules that the
page needs (app.py) import no torch.
"""
