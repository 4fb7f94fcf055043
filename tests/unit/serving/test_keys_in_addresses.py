"""Trainers that take an address and nothing else: OpenRLHF, slime and LLaMA-Factory send what stands in it as Basic credentials."""

from __future__ import annotations

import base64

import httpx
import pytest

from rayward.errors import AccessError
from rayward.serving.auth import Keys, parse_variable

KEY = "s3cret-0123456789abcdef"
KEYS = Keys(parse_variable(f"ppo:{KEY}"))


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


def test_the_key_of_an_address_is_the_password() -> None:
    sent = next(httpx.BasicAuth("any", KEY).auth_flow(httpx.Request("POST", "http://host/get_reward")))
    assert KEYS.caller_of(sent.headers["authorization"], None).name == "ppo"
    assert KEYS.caller_of(basic(f":{KEY}"), None).name == "ppo"
    assert KEYS.caller_of(basic(f"x:{KEY}").replace("Basic", "basic"), None).name == "ppo"


@pytest.mark.parametrize(
    "header", [basic(f"{KEY}:"), basic(KEY), basic("any:wrong"), "Basic", "Basic !!!", f"Basic {KEY}", basic("any:") + "=", f"Digest {KEY}"]
)
def test_anything_else_is_no_key_and_is_not_told(header: str) -> None:
    with pytest.raises(AccessError) as caught:
        KEYS.caller_of(header, "127.0.0.1")
    assert caught.value.status == 401
    assert KEY not in str(caught.value)
