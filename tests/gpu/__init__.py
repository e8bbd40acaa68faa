"""What only a GPU can show: `python -m pytest tests/gpu`, skipped where there is none.

ACCDIFF_TEST_DEVICE names another device than "cuda"; "cpu" runs all but what needs CUDA's memory, to debug the tests.
"""
