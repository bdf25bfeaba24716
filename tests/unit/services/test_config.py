"""One configuration from file, environment and flags; anything odd is refused by name."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvsluice.errors import ConfigError
from kvsluice.services.config import ServeConfig, load_config


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nmax-queue: 2\nmax_num_seqs: 3\n")
    config = load_config({"max_num_seqs": 33, "seed": None}, {"KVSLUICE_MAX_QUEUE": "22"}, file)
    assert (config.port, config.max_queue, config.max_num_seqs, config.seed) == (1, 22, 33, None)


def test_the_environment_may_name_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("port: 7")
    assert load_config({}, {"KVSLUICE_CONFIG": str(file)}).port == 7


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        ({"colour": 1}, {}, "colour"),
        ({}, {"KVSLUICE_COLOUR": "1"}, "KVSLUICE_COLOUR"),
        ({"port": "x"}, {}, "port"),
        ({"port": -1}, {}, "port"),
        ({}, {"KVSLUICE_PORT": "x"}, "KVSLUICE_PORT"),
        ({"grace_s": "nan"}, {}, "grace_s"),
        ({"grace_s": float("inf")}, {}, "grace_s"),
        ({"default_deadline_s": 0}, {}, "default_deadline_s"),
        ({"dtype": "int8"}, {}, "dtype"),
        ({"device": "tpu"}, {}, "device"),
        ({"role": "prefill"}, {}, "role"),
        ({"prefill_workers": 0}, {}, "prefill_workers"),
        ({"random_weights": "maybe"}, {}, "random_weights"),
    ],
)
def test_a_bad_key_or_value_is_refused_by_name(flags, environ, named):
    with pytest.raises(ConfigError, match=named):
        load_config(flags, environ)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "1: 2\n", "\tx"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        load_config({}, {}, file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config({}, {}, tmp_path / "no.yaml")


def test_other_variables_are_left_alone():
    assert load_config({}, {"KVSLUICED": "1", "PATH": "/bin"}) == load_config()


def test_it_is_frozen_and_survives_the_way_to_a_worker():
    config = load_config({"port": 5, "kv_cache_bytes": 1 << 30})
    assert ServeConfig.from_json(config.to_json()) == config
    with pytest.raises(ValidationError):
        config.port = 6


def test_clients_use_the_served_name():
    assert load_config({"model": "a"}).model_name == "a"
    assert load_config({"model": "a", "served_model_name": "b"}).model_name == "b"


@pytest.mark.parametrize("key", sorted(ServeConfig.model_fields))
def test_every_number_and_text_has_an_upper_bound(key):
    default = ServeConfig.model_fields[key].default
    kind = str(ServeConfig.model_fields[key].annotation)
    if isinstance(default, bool):
        return
    with pytest.raises(ConfigError, match=f"^{key}: "):
        load_config({key: "x" * 5000 if "str" in kind or "Literal" in kind else 10**30})


@pytest.mark.parametrize("host", ["a b", "x\n", "h/…", ""])
def test_a_host_of_odd_characters_is_refused(host):
    with pytest.raises(ConfigError, match="host"):
        load_config({"host": host})


def test_a_store_is_configured_as_a_whole():
    config = load_config({"store_url": "redis://u@h:1/2", "store_password_file": "secret", "durability": "tokens"})
    assert config.store.address.hosts == (("h", 1),)
    assert config.store.password_file.endswith("/secret")
    assert config.store.password_file.startswith("/"), "workers run in another folder"
    assert load_config({}).store is None


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"durability": "tokens"}, "durability"),
        ({"store_password_file": "x"}, "store_password_file"),
        ({"store_url": "memory://"}, "store_url"),
        ({"store_url": "redis://:hunter2@h"}, "store_url"),
        ({"store_url": "http://h"}, "store_url"),
        ({"store_url": "redis://h", "store_ca_file": "x"}, "store_ca_file"),
        ({"store_url": "redis://h", "store_total_timeout_s": 1}, "store_total_timeout_s"),
        ({"worker_lease_s": 0}, "worker_lease_s"),
        ({"max_migrations": -1}, "max_migrations"),
    ],
)
def test_a_store_that_cannot_be_names_the_key(given, key):
    with pytest.raises(ConfigError, match=f"^{key}: ") as caught:
        load_config(given)
    assert "hunter2" not in caught.value.message
