"""Settings of all tests; its place puts this folder on the path, so that tests can share `fake_folder`."""

import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for one another
