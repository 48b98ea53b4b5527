"""Kernels that are compiled once."""

from __future__ import annotations

import pytest

from tests.optim.emulated import Host


@pytest.fixture(scope="session")
def compiled_host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("optim"))


@pytest.fixture
def host(compiled_host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """In use, with the roundings of a CPU."""
    return compiled_host.used(monkeypatch)
