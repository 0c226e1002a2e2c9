"""Encoders that the tests of preprocessing share."""

import pytest
from filled_folder import make_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("models"))
