"""Reading packed rows inside a kernel: a block of keys as two halves of a head, a block of values whole.

Rows are named by byte addresses, so that one launch reads the tensors of many sequences. A `HINT` says by how many
bytes every row is aligned; without it the compiler would read element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

DENSE, CHANNEL, TOKEN, FLOAT8, LOWRANK = (tl.constexpr(i) for i in range(5))
RANK_BLOCK: tl.constexpr = tl.constexpr(32)

# `L`, how rows are packed, and `H`, the model's heads, are tuples of these
KIND, DTYPE, BITS, GROUP_SIZE, RANK, BALANCED, HINT, SHARING = (tl.constexpr(i) for i in range(8))
HEAD_DIM, NUM_KV_HEADS, GROUP = (tl.constexpr(i) for i in range(3))


@triton.jit
def product(a, b, out, WIDE: tl.constexpr):
    """out + a b in float32; `WIDE` multiplies in float32, as the interpreter must."""
    if WIDE:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), out, input_precision="ieee")
    else:
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def row_pointers(base, offsets, DTYPE: tl.constexpr, HINT: tl.constexpr):
    """Pointers [N] to rows at byte offsets from byte addresses."""
    return tl.multiple_of((base + offsets).to(tl.pointer_type(DTYPE)), HINT)


@triton.jit
def dense_block(rows, FIRST: tl.constexpr, inside, DTYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Elements FIRST..FIRST + WIDTH of rows [N] -> [N, BLOCK]."""
    dims = tl.arange(0, BLOCK)
    mask = inside[:, None] & (dims < WIDTH)[None, :]
    return tl.load(rows[:, None] + FIRST + dims[None, :], mask=mask, other=0)


@triton.jit
def code_block(rows, first_byte, inside, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Integers of WIDTH channels from rows [N] of packed bytes -> uint8 [N, BLOCK]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    at = tl.arange(0, BLOCK // PER_BYTE)
    mask = inside[:, None] & (at < (WIDTH + PER_BYTE - 1) // PER_BYTE)[None, :]
    packed = tl.load(rows[:, None] + first_byte + at[None, :], mask=mask, other=0)
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        odd = tl.interleave((packed >> 2) & 3, packed >> 6)
        codes = tl.interleave(even, odd)
    return codes


@triton.jit
def scale_block(
    base, local, head, inside, L: tl.constexpr, H: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """float32 [N, BLOCK], or [N, 1]: the scales, or minima, of channels FIRST..FIRST + WIDTH of rows `local`."""
    GROUP: tl.constexpr = L[GROUP_SIZE]
    NUM_GROUPS: tl.constexpr = (H[HEAD_DIM] + GROUP - 1) // GROUP
    if L[KIND] == CHANNEL:
        HINT: tl.constexpr = 16 if H[HEAD_DIM] % 8 == 0 else 2
        offsets = ((local // GROUP) * H[NUM_KV_HEADS] + head) * (H[HEAD_DIM] * 2)
        # consecutive keys that surely share scales, which are read once
        SPAN: tl.constexpr = L[SHARING]
        places = tl.max(tl.reshape(base + offsets, [BLOCK_N // SPAN, SPAN]), 1)
        any_inside = tl.max(tl.reshape(inside.to(tl.int32), [BLOCK_N // SPAN, SPAN]), 1) > 0
        rows = row_pointers(places, 0, tl.float16, HINT)
        dims = tl.arange(0, BLOCK)
        mask = any_inside[:, None] & (dims < WIDTH)[None, :]
        few = tl.load(rows[:, None] + FIRST + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        spread = tl.broadcast_to(few[:, None, :], [BLOCK_N // SPAN, SPAN, BLOCK])
        out = tl.reshape(spread, [BLOCK_N, BLOCK])
    else:
        row = (base + (local * H[NUM_KV_HEADS] + head) * (NUM_GROUPS * 2)).to(tl.pointer_type(tl.float16))
        if FIRST // GROUP == (FIRST + WIDTH - 1) // GROUP:
            out = tl.load(row + FIRST // GROUP, mask=inside, other=0.0).to(tl.float32)[:, None]
        else:
            # channels that share a scale in every group that they touch: the largest power of two in both
            SPAN: tl.constexpr = (FIRST | GROUP) & -(FIRST | GROUP)
            groups = (FIRST + tl.arange(0, BLOCK // SPAN) * SPAN) // GROUP
            mask = inside[:, None] & (groups < NUM_GROUPS)[None, :]
            few = tl.load(row[:, None] + groups[None, :], mask=mask, other=0.0).to(tl.float32)
            spread = tl.broadcast_to(few[:, :, None], [BLOCK_N, BLOCK // SPAN, SPAN])
            out = tl.reshape(spread, [BLOCK_N, BLOCK])
    return out


@triton.jit
def integer_block(
    codes, scale, minimum, balance, local, head, inside, L: tl.constexpr, H: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """float32 [N, BLOCK] of channels FIRST..FIRST + WIDTH; `codes`, `scale`, `minimum` are byte addresses [N]."""
    ROW_BYTES: tl.constexpr = (H[HEAD_DIM] * L[BITS] + 7) // 8
    rows = row_pointers(codes, (local * H[NUM_KV_HEADS] + head) * ROW_BYTES, tl.uint8, L[HINT])
    values = code_block(rows, FIRST * L[BITS] // 8, inside, L[BITS], WIDTH, BLOCK).to(tl.float32)
    steps = scale_block(scale, local, head, inside, L, H, FIRST, WIDTH, BLOCK, BLOCK_N)
    lows = scale_block(minimum, local, head, inside, L, H, FIRST, WIDTH, BLOCK, BLOCK_N)
    out = values * steps + lows
    if L[BALANCED]:
        dims = tl.arange(0, BLOCK)
        factors = balance.to(tl.pointer_type(tl.float32)) + head * H[HEAD_DIM] + FIRST + dims
        out = out / tl.load(factors, mask=dims < WIDTH, other=1.0)[None, :]
    return out


@triton.jit
def _basis_block(basis, head, begin, H: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """bfloat16 [RANK_BLOCK, BLOCK]: rows `begin`… of the basis, channels FIRST..FIRST + WIDTH of a head."""
    columns, dims = begin + tl.arange(0, RANK_BLOCK), tl.arange(0, BLOCK)
    # halves of heads begin at multiples of 16 bytes, as heads have multiples of 16 channels
    table = tl.multiple_of((basis + (head * H[HEAD_DIM] + FIRST) * 2).to(tl.pointer_type(tl.bfloat16)), 16)
    entries = table + columns[:, None] * (H[NUM_KV_HEADS] * H[HEAD_DIM]) + dims[None, :]
    return tl.load(entries, mask=(columns < L[RANK])[:, None] & (dims < WIDTH)[None, :], other=0.0)


@triton.jit
def basis_sums(
    basis, head, L: tl.constexpr, H: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """float32 [BLOCK], what a factor row of ones gives; zeros where integer factors are not offset."""
    out = tl.zeros([BLOCK], tl.float32)
    if (L[KIND] == LOWRANK) & (L[BITS] != 16):
        rows = tl.zeros([RANK_BLOCK, BLOCK], tl.float32)
        for begin in range(0, L[RANK], RANK_BLOCK):
            rows += _basis_block(basis, head, begin, H, L, FIRST, WIDTH, BLOCK).to(tl.float32)
        out = tl.sum(rows, 0)
    return out


@triton.jit
def _factor_rows(rows, begin, inside, L: tl.constexpr):
    """bfloat16 [N, RANK_BLOCK]: factors `begin`… of rows, integers where they are packed as such, which are exact."""
    if L[BITS] == 16:
        columns = begin + tl.arange(0, RANK_BLOCK)
        out = tl.load(rows[:, None] + columns[None, :], mask=inside[:, None] & (columns < L[RANK])[None, :], other=0.0)
    else:
        # what lies behind the last column meets zeros of the basis
        codes = code_block(rows, begin * L[BITS] // 8, inside, L[BITS], L[RANK] - begin, RANK_BLOCK)
        out = codes.to(tl.float32).to(tl.bfloat16)
    return out


@triton.jit
def _scaled(out, a1, a2, sums, local, inside, L: tl.constexpr):
    """Products of integer factors [N, BLOCK] with their rows' scales and minima."""
    if L[BITS] != 16:
        step = tl.load((a1 + local * 2).to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)
        low = tl.load((a2 + local * 2).to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)
        out = out * step[:, None] + low[:, None] * sums[None, :]
    return out


@triton.jit
def _factor_pointers(a0, local, L: tl.constexpr):
    if L[BITS] == 16:
        out = row_pointers(a0, local * (L[RANK] * 2), tl.bfloat16, L[HINT])
    else:
        out = row_pointers(a0, local * ((L[RANK] * L[BITS] + 7) // 8), tl.uint8, L[HINT])
    return out


@triton.jit
def factor_block(
    tensors, basis, sums, local, head, inside, L: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """float32 [N, BLOCK]: factor rows times a head's basis, whose `basis_sums` are `sums`."""
    a0, a1, a2 = tensors
    rows, out = _factor_pointers(a0, local, L), tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for begin in range(0, L[RANK], RANK_BLOCK):
        left = _factor_rows(rows, begin, inside, L)
        out = product(left, _basis_block(basis, head, begin, H, L, 0, H[HEAD_DIM], BLOCK), out, WIDE)
    return _scaled(out, a1, a2, sums, local, inside, L)


@triton.jit
def factor_halves(
    tensors, basis, sums, local, head, inside, L: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`factor_block` as two halves of a head [N, BLOCK]; every factor is read once for both. `sums` are two as well."""
    a0, a1, a2 = tensors
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    rows = _factor_pointers(a0, local, L)
    low, high = tl.zeros([BLOCK_N, BLOCK], tl.float32), tl.zeros([BLOCK_N, BLOCK], tl.float32)
    for begin in range(0, L[RANK], RANK_BLOCK):
        left = _factor_rows(rows, begin, inside, L)
        low = product(left, _basis_block(basis, head, begin, H, L, 0, HALF, BLOCK), low, WIDE)
        high = product(left, _basis_block(basis, head, begin, H, L, HALF, HALF, BLOCK), high, WIDE)
    return _scaled(low, a1, a2, sums[0], local, inside, L), _scaled(high, a1, a2, sums[1], local, inside, L)


@triton.jit
def packed_block(
    tensors, basis, local, head, inside, L: tl.constexpr, H: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[N, BLOCK] of channels FIRST..FIRST + WIDTH of rows `local` of a head: dense rows in their dtype, others float32.
    Factor rows are read by `factor_block` and `factor_halves`.

    `tensors` are byte addresses [N] of the tensors that hold each row, `basis` is one address.
    """
    a0, a1, a2 = tensors
    if L[KIND] == DENSE:
        row_bytes: tl.constexpr = H[HEAD_DIM] * (L[DTYPE].primitive_bitwidth // 8)
        rows = row_pointers(a0, (local * H[NUM_KV_HEADS] + head) * row_bytes, L[DTYPE], L[HINT])
        out = dense_block(rows, FIRST, inside, L[DTYPE], WIDTH, BLOCK)
    elif L[KIND] == FLOAT8:
        rows = row_pointers(a0, (local * H[NUM_KV_HEADS] + head) * H[HEAD_DIM], tl.int8, L[HINT])
        scale = tl.load(basis.to(tl.pointer_type(tl.float32)))
        codes = dense_block(rows, FIRST, inside, tl.int8, WIDTH, BLOCK)
        out = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    else:
        out = integer_block(a0, a1, a2, basis, local, head, inside, L, H, FIRST, WIDTH, BLOCK, BLOCK_N)
    return out


@triton.jit
def half_sums(basis, head, L: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """`basis_sums` of the two halves of a head."""
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    return basis_sums(basis, head, L, H, 0, HALF, BLOCK), basis_sums(basis, head, L, H, HALF, HALF, BLOCK)


@triton.jit
def packed_halves(
    tensors, basis, sums, local, head, inside, L: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows `local` of a head as two halves [N, BLOCK], see `packed_block`; `sums` are `half_sums`."""
    HALF: tl.constexpr = H[HEAD_DIM] // 2
    if L[KIND] == LOWRANK:
        low, high = factor_halves(tensors, basis, sums, local, head, inside, L, H, BLOCK, BLOCK_N, WIDE)
    else:
        low = packed_block(tensors, basis, local, head, inside, L, H, 0, HALF, BLOCK, BLOCK_N)
        high = packed_block(tensors, basis, local, head, inside, L, H, HALF, HALF, BLOCK, BLOCK_N)
    return low, high
