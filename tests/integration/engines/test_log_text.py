"""What engines log of exceptions that are not the project's own: type and place, never their text."""

from __future__ import annotations

import logging

import pytest

from kvsluice.errors import FrameMismatch, InternalError
from kvsluice.services.decode import engine as decode_engine
from kvsluice.services.decode import sequence


@pytest.fixture
def logged(caplog, monkeypatch):
    """What was logged, as a handler would print it; the service's own logging does not propagate once it is set up."""
    monkeypatch.setattr(logging.getLogger("kvsluice"), "propagate", True)
    return lambda: caplog.text


def fault(*args, **options):
    raise RuntimeError("secret detail")


@pytest.mark.parametrize("verb", ["layer", "done"])
def test_prefill_logs_no_text_of_what_a_receiver_raises(logged, prefill, prompt, sink, verb: str) -> None:
    engine = prefill.engine()
    out = sink("a", on_call=lambda called, _: fault() if called == verb else None)
    engine.submit(prefill.job("a", prompt(20)), out)
    prefill.run(engine)
    assert "RuntimeError at fault" in logged()
    assert "secret" not in logged()


def test_decode_logs_no_text_of_a_fault(logged, monkeypatch, bench, encode, prompt, sampling) -> None:
    encoded, b = encode(prompt(30), sampling.drawn(4)), bench()
    b.open("a", encoded)
    monkeypatch.setattr(decode_engine, "check_start", fault)
    for layer in encoded.layers:
        b.engine.add_layer("a", layer)
    with pytest.raises(InternalError):
        b.engine.commit("a", encoded.ids, encoded.first)
    assert "RuntimeError at fault" in logged()
    assert "secret" not in logged()


def test_decode_logs_no_text_of_a_layer_that_does_not_fit(logged, monkeypatch, bench, encode, prompt, sampling) -> None:
    encoded, b = encode(prompt(30), sampling.drawn(4)), bench()
    b.open("a", encoded)
    monkeypatch.setattr(sequence, "on_device", fault)
    with pytest.raises(FrameMismatch):
        b.engine.add_layer("a", encoded.layers[0])
    assert "RuntimeError at fault" in logged()
    assert "secret" not in logged()
