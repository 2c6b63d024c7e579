"""One thread for each test process: two that share two cores wait for each other's barriers, 3.7 times as long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, and for the processes that tests start

import torch

torch.set_num_threads(1)
