"""Decoder-only models over published checkpoints: configuration, weights, tokenizer, forward pass, sampling.

    checkpoint ──config.py──> ModelConfig ──loader.py──> Model ──forward.py──> hidden rows ──logits──> sampling.py
        └──tokenizer.py (no torch) ──> Tokenizer

`adapters/` holds low-rank adapters of built-in models, `profiles/` what was calibrated for a model.
"""
