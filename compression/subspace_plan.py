"""How often `subspace.leading_subspace` multiplies, and what that takes. Free of torch."""

from __future__ import annotations

# products by the matrix between one orthonormalisation and the next. The first leaves columns that all lean towards the
# strongest eigenvectors, so only those behind it, whose columns are in order, bear two; the last makes up for what
# rounding has taken from columns whose eigenvalues are far apart
PRODUCTS = (1, 2, 2, 1)


def subspace_flops(width: int, rank: int) -> float:
    """Operations of `leading_subspace`, a multiply-add counted as two: products by the matrix, and for each
    orthonormalisation one of the columns with themselves, a Cholesky factor and a triangular solve."""
    orthonormal = 2.0 * width * rank**2 + rank**3 / 3 + width * rank**2
    return sum(PRODUCTS) * 2.0 * width**2 * rank + len(PRODUCTS) * orthonormal
