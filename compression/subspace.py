"""The leading eigenvectors of a Gram matrix by matrix products and small Cholesky factors alone, so that no step of it
waits for the device: a library's eigensolver copies to the host whether it converged."""

from __future__ import annotations

import torch
from torch import Tensor

# products by the matrix between one orthonormalisation and the next. The first one leaves columns that all lean towards
# the strongest eigenvectors, so only the second, whose columns are in order, bears two; the last two keep columns
# orthonormal whose eigenvalues are ten million times apart
PRODUCTS = (1, 2, 1, 1)
# added to all eigenvalues, as a share of their sum: what a sum in float32 leaves open, and what keeps columns apart
# where rows are fewer than columns, equal or zero
FLOOR = 2.0**-24
# added to the diagonal of a column's product with itself, as a share of it: what rounding in float64 may take from it
SHIFT = 2.0**-40


def leading_subspace(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal columns that span nearly what the eigenvectors of the largest eigenvalues do, the strongest first.

    Orthogonal iteration (Golub and Van Loan, Matrix Computations, §8.2; for a random start Halko et al., arXiv
    0909.4061 §4.5), orthonormalised by shifted Cholesky QR (Fukaya et al., arXiv 1809.11085). Of rows that the Gram
    matrix stands for, what the columns leave over is at most 1.02 times as long as what the eigenvectors do, where
    eigenvalues hardly fall (white noise, up to half of the width), and 1.01 times where they do. Columns that are wanted
    beyond half of the width come less close, in what is little by then.

    The start is drawn from a fixed seed: the same matrix gives the same bits on the same device. Nothing waits for the
    device.

    Args:
        gram: float64 [w, w], symmetric, its eigenvalues at least 0 but for rounding; is overwritten.
        rank: 1 to w.

    Returns:
        float64 [w, rank]; NaN where `gram` is not finite.
    """
    # a sum of 0 is that of rows of zeros, for which every basis is as good
    gram /= gram.diagonal().sum().clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(FLOOR)
    generator = torch.Generator(gram.device).manual_seed(0)
    columns = torch.randn(len(gram), rank, dtype=gram.dtype, device=gram.device, generator=generator)
    for products in PRODUCTS:
        for _ in range(products):
            columns = gram @ columns
        columns = _orthonormal(columns)
    return columns


def _orthonormal(columns: Tensor) -> Tensor:
    """The Q of columns = Q R, R upper triangular: column j of Q depends on the first j columns alone."""
    products = columns.T @ columns
    products.diagonal().mul_(1 + SHIFT)
    # unlike `cholesky`, which copies to the host whether the matrix was positive definite
    lower = torch.linalg.cholesky_ex(products, check_errors=False).L
    return torch.linalg.solve_triangular(lower.T, columns, upper=True, left=False)
