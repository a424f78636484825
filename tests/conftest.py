"""What holds for every test.

One thread, so that sums are the same on any machine; no network; no dataset of the
user's.
"""

import socket

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# A core that others share may pause an example for longer than any deadline.
hypothesis.settings.register_profile("shared core", deadline=None)
hypothesis.settings.load_profile("shared core")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path_factory):
    """Refuses connections, and looks for datasets where there are none."""

    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == getattr(socket, "AF_UNIX", None):
            # Of this machine: how tests reach what forks for them.
            return connect(self, address)
        raise AssertionError(f"tests run without network, tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv(
        "AUTOPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "no_datasets")
    )
