"""One torch thread a process: with tiny models several only wait for each other, and pytest-xdist uses the cores.

No deadlines: tests assert correctness, not time.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the commands that tests start

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
