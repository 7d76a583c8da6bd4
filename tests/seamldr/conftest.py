"""One signing key and one loader test bench for all tests of the SEAM side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pseamldr_bench import KEY, LoaderBench


@pytest.fixture(scope="session")
def signing_key() -> rsa.RSAPrivateKey:
    """The test key, RSA-3072."""
    return KEY


@pytest.fixture
def make_bench() -> Iterator[Callable[..., LoaderBench]]:
    """A factory of benches with a P-SEAMLDR just launched; their memory goes with the test."""
    benches: list[LoaderBench] = []

    def make(**arguments: Any) -> LoaderBench:
        benches.append(LoaderBench(**arguments))
        return benches[-1]

    yield make
    for bench in benches:
        bench.memory.close()


@pytest.fixture
def bench(make_bench: Callable[..., LoaderBench]) -> LoaderBench:
    """The baseline: module 1.5.06 loaded and shut down for an update, 5 updates left."""
    baseline = make_bench()
    baseline.load_baseline()
    return baseline
