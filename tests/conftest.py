"""One torch thread a process: with tiny models several only wait for each other, and pytest-xdist uses the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the commands that tests start

import torch

torch.set_num_threads(1)
