"""Settings of all tests; its place puts this folder on the path, so that tests can share `fake_folder`."""

import logging

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for one another


@pytest.fixture(autouse=True)
def plain_logging():
    """Undo what a command's logging set-up leaves behind: pytest catches only what reaches the root logger."""
    yield
    for name in ("library", "dataset"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
