"""How a client's key and TLS are found and refused."""

from __future__ import annotations

import pytest

from kvsluice.client import Client
from kvsluice.errors import ConfigError, InvalidRequest
from kvsluice.services import connection
from kvsluice.services.config import load_config


@pytest.mark.parametrize("key", ["", "a b", "a\n", "é", "x" * 513, 5])
def test_a_key_that_is_none_is_refused_and_not_shown(key):
    with pytest.raises(InvalidRequest, match="api_key") as caught:
        Client(api_key=key)
    assert len(str(key)) < 3 or str(key) not in caught.value.message


def test_the_environment_stands_in_for_what_is_not_given():
    environ = {"KVSLUICE_API_KEY": "k", "KVSLUICE_TLS": "no", "KVSLUICE_TLS_CA": "/ca.pem"}
    assert connection.with_environment({}, environ) == {
        "api_key": "k", "tls": False, "tls_ca": "/ca.pem", "tls_cert": None, "tls_key": None,
    }  # fmt: skip
    assert connection.with_environment({"api_key": "other", "tls": True}, environ)["api_key"] == "other"
    with pytest.raises(ConfigError, match="KVSLUICE_TLS"):
        connection.with_environment({}, {"KVSLUICE_TLS": "perhaps"})
    assert load_config({}, environ | {"KVSLUICE_PORT": "7"}).port == 7, "a service reads none of them"


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InvalidRequest, match="tls_key"):
        Client(tls_cert="c.pem")
    with pytest.raises(ConfigError, match="tls_ca: cannot read"):
        Client(tls_ca=str(tmp_path / "none"))
    file = tmp_path / "key"
    file.write_text("  a-key\n")
    assert connection.read_key(file) == "a-key"
    for text in ("", "one two", "one\ntwo"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--api-key-file"):
            connection.read_key(file)
    with pytest.raises(ConfigError, match="cannot read"):
        connection.read_key(tmp_path / "none")
