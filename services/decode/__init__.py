"""Decode: one token a step for every running choice, over compressed caches.

scheduler (states, admission, fairness; no torch) · pages (who holds which bytes; no torch) · sequence (what one choice
needs to go on) · engine (one step)
"""
