"""Epochs tell attempts at one request apart inside the engine, too."""

from __future__ import annotations

import pytest

from kvsluice.errors import RequestCancelled


def test_calls_that_mean_another_epoch_change_nothing(bench, encode, prompt, sampling) -> None:
    encoded, b = encode(prompt(30), sampling.drawn(6)), bench()
    b.open("a", encoded)
    b.step()
    epoch = b.events[-1].epoch
    with pytest.raises(RequestCancelled):
        b.engine.add_layer("a", encoded.layers[0], epoch + 1)
    for layer in encoded.layers:
        b.engine.add_layer("a", layer, epoch)
    with pytest.raises(RequestCancelled):
        b.engine.commit("a", encoded.ids, encoded.first, epoch + 1)
    assert not b.engine.cancel("a", epoch=epoch + 1)
    b.engine.commit("a", encoded.ids, encoded.first, epoch)
    b.run()
    assert len(b.tokens("a")) == 5
