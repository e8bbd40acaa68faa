"""What of a WebUI this project's code touches, and what the real ones have there: names and signatures, no code.

`record.py` reads a WebUI's folder and writes one JSON for each; tests/test_contract.py compares without a WebUI.
"""
