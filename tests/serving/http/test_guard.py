"""Who may call: own hosts, no foreign pages, and the key where there is one."""

import pytest
from starlette.datastructures import Headers

from qmix.serving.http.errors import ApiError
from qmix.serving.http.guard import Access


def refusal(access=None, path="/v1/models", **headers):
    """The status and code with which a request is refused; None: it may pass."""
    try:
        (access or Access()).check(Headers(headers), path)
    except ApiError as error:
        return error.status, error.code
    return None


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.9", "box:1"]
)
def test_own_hosts_pass(host):
    assert refusal(Access(host_names=frozenset({"box"})), host=host) is None


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b"]
)
def test_other_hosts_do_not(host):
    assert refusal(host=host) == (403, "wrong_host")
    assert refusal() == (403, "wrong_host")


def test_a_page_of_this_server_may_call_and_others_may_not():
    assert refusal(host="localhost:80", origin="http://localhost:80") is None
    for origin in ("http://localhost:81", "https://evil.example", "null", "http://[", "localhost"):
        assert refusal(host="localhost:80", origin=origin) == (403, "wrong_origin")


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer é"]
)
def test_a_key_is_needed_where_there_is_one(given):
    access = Access("secret")
    headers = {"host": "localhost"} | ({} if given is None else {"authorization": given})
    assert refusal(access, **headers) == (401, "invalid_api_key")
    assert refusal(access, "/health", **headers) is None


def test_the_right_key_passes():
    assert refusal(Access("secret"), host="localhost", authorization="Bearer secret") is None
