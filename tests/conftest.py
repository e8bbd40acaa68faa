"""One torch thread a process: with tiny models several only wait for each other, and pytest-xdist uses the cores."""

import torch

torch.set_num_threads(1)
