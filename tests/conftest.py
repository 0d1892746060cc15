"""One torch thread per test process: tiny models gain nothing from more, and two processes fight over the cores."""

import torch

torch.set_num_threads(1)
