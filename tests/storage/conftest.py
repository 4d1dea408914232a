"""Both formats saved once, for all tests of this folder."""

import pytest

from tests.sealed_files import FORMATS, Store, make_store


@pytest.fixture(scope="session", params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(request.param, tmp_path_factory.mktemp("saved"))
