"""What the tests of several clients share."""

import pytest


@pytest.fixture(scope="module")
def client(served):
    """An OpenAI client of the module's own server."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client
