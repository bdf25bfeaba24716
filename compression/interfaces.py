"""What passes between the engines and the compression library: observations in, encoded layers and caches out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..kernels.step_attention import RecallView, Shift, View
from .layout import Part as Part
from .spec import Recipe

if TYPE_CHECKING:
    from .kept_choice import KeptChoice
    from .redone import RedoneRow
    from .sealing import Sealing
    from .segment import Tail

Rope = Callable[[Tensor, Tensor], Tensor]
"""rope(x [n, heads, d], positions int64 [n] or [n, heads]) -> rotated x, bound to one sequence's prompt length."""

Summed = Callable[[Tensor], Tensor]
"""summed(x) -> x, in place, added up over the ranks that hold a model's heads."""


@dataclass
class LayerObs:
    """All that prefill knows of one finished layer of one prompt. The compressor takes keys and values over.

    Attributes:
        layer: its index.
        positions: int64 [n], original positions of the rows, ascending.
        num_prompt_tokens: N, rows of the whole prompt; n < N after selective propagation.
        k_pre: [n, Hkv, d] keys before RoPE (after any key norm); no rows unless `Compressor.wants_unrotated_keys`.
        k: [n, Hkv, d] keys after RoPE.
        v: [n, Hkv, d].
        q_window: [w, H, d] post-RoPE queries of the last w rows, w = what `Compressor.query_window` asks for.
        mass: float32 [Hkv, n] attention that each row has received from all queries, summed over the GQA group; None
            unless `Compressor.wants_mass`.
        query_peak: float32 [Hkv, d] largest |q| of every channel over all post-RoPE queries and the GQA group; None
            unless `Compressor.wants_query_peak`.
        hidden: [n, D] rows behind the layer; None unless `Compressor.wants_hidden`. Only read.
    """

    layer: int
    positions: Tensor
    num_prompt_tokens: int
    k_pre: Tensor
    k: Tensor
    v: Tensor
    q_window: Tensor
    mass: Tensor | None = None
    query_peak: Tensor | None = None
    hidden: Tensor | None = None

    def release_keys(self) -> None:
        """Let go of the keys, before and after RoPE."""
        self.k_pre, self.k = self.k_pre.new_empty(0), self.k.new_empty(0)


@dataclass(frozen=True)
class EncodedLayer:
    """One layer's KV of one prompt as it is sent, stored and read. Owns its tensors (no views of larger ones).

    Attributes:
        layer: its index.
        tensors: part -> name -> contiguous tensor. Axis 0 of every tensor is the one along which it may be sliced for
            sending. Order and names are fixed by the recipe.
    """

    layer: int
    tensors: Mapping[Part, Mapping[str, Tensor]]

    def nbytes(self) -> int:
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


class Compressor(Protocol):
    """A resolved recipe at work during prefill of one prompt. Between layers it holds the rows of layers that share
    with one still to come, and nothing else."""

    recipe: Recipe
    wants_unrotated_keys: bool
    wants_mass: bool
    wants_query_peak: bool

    def query_window(self, layer: int) -> int:
        """How many of the last rows' queries `finish_layer` wants; 0 = none."""
        ...

    def wants_hidden(self, layer: int) -> bool:
        """Whether `finish_layer` wants the rows behind this layer."""
        ...

    def finish_layer(self, obs: LayerObs) -> tuple[list[EncodedLayer], Tensor | None]:
        """Encode a finished layer; called in the layers' order. Returns the layers that are ready to leave, in order
        (none while a layer waits for others of its group), and the ascending row indices (int64, into obs rows) that
        enter the next layer, or None when all do.

        Takes the keys and values of `obs` over: what is encoded as it is becomes the encoded layer's, and keys that
        are packed are let go before the values are."""
        ...


@dataclass
class ReadCounter:
    """What attention cost.

    Attributes:
        bytes_read: of KV, landmarks and metadata.
        rows_recalled: that were brought back, see `SequenceCache.recall`.
    """

    bytes_read: int = 0
    rows_recalled: int = 0


class HeldPages(Protocol):
    """Pages of host memory; they go back to where they came from when the object is dropped."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """uint8 [page_nbytes] each, pinned where a GPU reads them."""
        ...


class PageSource(Protocol):
    """Host memory in pages of one size, which admission has reserved.

    Attributes:
        page_nbytes: a multiple of 16.
    """

    page_nbytes: int

    def take(self, num_pages: int) -> HeldPages: ...


class OffloadedValues(Protocol):
    """Values of a layer's prompt in pages of host memory, which the choices of a request share."""

    @property
    def views(self) -> tuple[Tensor, ...]:
        """uint8 [page_nbytes] each; none while they are away."""
        ...

    @property
    def num_pages(self) -> int: ...

    def leave(self) -> None:
        """Let go of the pages, of which somebody has a copy. Nothing is asked of the cache until `enter`, and
        `SequenceCache.relocated` after it."""
        ...

    def enter(self, held: HeldPages) -> None:
        """Lie in these pages, as many as before, to which the copy is brought."""
        ...


class SequenceCache(Protocol):
    """The KV of one choice of one sequence on a decode worker, all layers. Built from `EncodedLayer`s.

    Region of one layer, by position:

        [ sinks | sealed: compressed, some rows or all | tail: exact ]      outliers: exact copies per KV head
          fixed   prompt part shared between choices     grows a row a      recalled: exact, see `recall`
                  + own blocks sealed while decoding     generated token
    """

    recipe: Recipe
    counter: ReadCounter
    version: int
    """Grows whenever rows move or are sealed: views of before are void."""
    moves: int
    """Grows whenever tables of before are void: `shift` says what the others have to be brought up to date by."""

    def add_layer(self, encoded: EncodedLayer) -> None: ...

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Add generated rows [q, Hkv, d] (k_pre before RoPE, k after) at positions int64 [q]."""
        ...

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """q [Q, H, d] post-RoPE at positions int64 [Q] -> [Q, H, d]. Row i sees cached rows up to its own position
        only, and only those within the layer's sliding window."""
        ...

    def recall(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows that go on behind this layer together with those of the pass, before them: hidden rows [R, D] of the
        dtype of `like` and their positions int64 [R]; None = none. From here on `append` and `attend` get both."""
        ...

    @property
    def runs_apart(self) -> bool:
        """Its rows do more than the batched kernels do, and run one sequence by the other; known once all layers are
        here."""
        ...

    @property
    def most_rows_kept(self) -> int:
        """Rows that `rows` gives at once, at most."""
        ...

    def reserve(self, num_rows: int, like: Tensor) -> None:
        """Make room for so many more rows in every layer, of the shape and dtype of `like` [_, Hkv, d]."""
        ...

    def views(self) -> list[View]:
        """Every layer as the batched kernels read it; needs room for the rows that they will append."""
        ...

    def recall_view(self) -> RecallView | None:
        """What the batched kernels may bring back; needs the same room. None = nothing."""
        ...

    def begin_step(self) -> None:
        """Leave the next row to the batched kernels. What they bring back is known here once somebody asks, who then
        waits for them."""
        ...

    @property
    def rows_uncounted(self) -> int:
        """By how many rows a count of all that ever came back, as kernels have it, exceeds what `counter` counts."""
        ...

    def shift(self) -> Shift | None:
        """What tables of views since the last of the `moves` have to say after sealing; None where they are to be made
        anew."""
        ...

    def advance(self, num_rows: int) -> None:
        """Count rows that kernels have appended, and attended from, in every layer."""
        ...

    def chosen(self) -> Sequence[KeptChoice]:
        """Copies of what positions share that were chosen for (`select_every`), for `withdraw`."""
        ...

    def withdraw(self, position: int, chosen: Sequence[KeptChoice] = ()) -> None:
        """Forget the rows from `position` on, which no block has sealed: they came of a pass that failed, and some
        layers may have none. Appending them again gives what it would have given.

        Args:
            chosen: what `chosen` gave before that pass, where it had several rows; a single one chooses the same again.
        """
        ...

    def redone(self) -> RedoneRow:
        """The cache as its last row sees it that attends to everything in it; to be used before anything is appended or
        sealed. Changes nothing."""
        ...

    def rows_until_seal(self, position: int) -> int:
        """How many rows from `position` on may be appended and attended together before `seal` is due; at least 1."""
        ...

    def seal(self, next_position: int) -> None:
        """Seal every block that is due when the next row will have `next_position`; a pure function of it."""
        ...

    def rows(self, begin: int, end: int) -> list[EncodedLayer]:
        """Copies of the exact rows at positions begin ≤ p < end, which no layer has sealed yet: of each layer, in
        order, `k` and `v` [end - begin, Hkv, d] as its tail holds them, and what they have recalled, see `recall`."""
        ...

    def put_rows(self, begin: int, layers: Sequence[EncodedLayer]) -> None:
        """Append what `rows` gave, from position `begin`, the end of what is here, and seal what is due on the way:
        the cache is then what it was where the rows came from.

        Raises:
            FrameMismatch: a layer is missing, or its rows are not what its tail holds.
        """
        ...

    @property
    def end(self) -> int:
        """Position of the next row."""
        ...

    def truncate(self, end: int) -> bool:
        """Forget the rows from position `end` on. False, and nothing is forgotten, where the cache would not be what it
        was before they came, as for rows that something was sealed or chosen after."""
        ...

    def prepare_seal(self, next_position: int, most_layers: int) -> int:
        """Pack ahead what `seal` will, where the rows are all here and sealing is due before `next_position`; in so
        many layers at most. Returns in how many. Changes nothing that attention sees; `seal` then has less to do."""
        ...

    def sealing(self) -> Sealing | None:
        """What seals blocks together with those of other caches; None where they are packed layer by layer."""
        ...

    def moving_tails(self) -> Sequence[Tail]:
        """Tails whose rows are to move to the front, because blocks were sealed from them."""
        ...

    def note_moved(self) -> None:
        """Say that tables and views of before are void."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """Everything it holds on the device, what forks share included. Their storages may be emptied while nothing is
        asked of the cache or its forks, and filled again elsewhere; see `relocated`."""
        ...

    def relocated(self) -> None:
        """Say that storages of `tensors` lie elsewhere now, with the same bytes."""
        ...

    def fork(self) -> SequenceCache:
        """Another choice over the same prompt: shares what the prompt made, owns what it appends."""
        ...

    def shared_nbytes(self) -> int: ...
    def own_nbytes(self) -> int: ...
    def nbytes(self) -> int:
        """Bytes really held on the device, metadata included (shared + own)."""
        ...

    def host_nbytes(self) -> int:
        """Bytes of pages held in host memory; forks share them."""
        ...

    def host_values(self) -> Sequence[OffloadedValues]:
        """What lies in those pages."""
        ...
