"""Prefill: prompts run layer by layer, several at a time, and each layer's compressed KV leaves as soon as it is final.

batcher (which work items run next, no torch) · state (one prompt's rows and one layer's KV) · engine (one pack a step)
"""
