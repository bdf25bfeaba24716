"""Tensor operations, one folder an op.

Each folder has `op.py` (checks and dispatches), `reference.py` (plain torch, every device) and, where there is one,
`triton.py` or `triton/` (compiled kernels and their launches, imported when a CUDA tensor first needs them). The
folder's `__init__.py` exports the public function. Triton launches on the current device, so each launch first makes
that of its tensors current. Nothing here knows of models, recipes or services.
"""
