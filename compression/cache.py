"""The KV of one choice of one sequence on a decode worker. Region diagrams: `interfaces.SequenceCache`, `layout`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import FrameMismatch
from ..kernels.dispatch import TRITON, runs
from ..kernels.step_attention import RecallView, Shift, View
from .checks import check_tensors
from .codecs import compact
from .hidden_rows import HiddenRows
from .host_values import HostValues
from .interfaces import EncodedLayer, PageSource, Part, ReadCounter, Rope, SequenceCache, Summed
from .kept_choice import KeptChoice
from .layer_cache import LayerCache
from .layout import NEVER, recall_plan, rows_until_seal, sealed_end
from .recall import NAMES as RECALLED
from .recall import Recall
from .redone import RedoneRow
from .saved_rows import check_rows, put_saved_rows, saved_rows
from .sealing import Sealing, own_angles, pack_blocks
from .segment import Kit, Tail, storage_nbytes
from .spec import ModelShape, Recipe
from .views import FixedPlaces, layer_view, recall_view, recalls_in_steps


def make_cache(
    recipe: Recipe,
    shape: ModelShape,
    num_prompt_tokens: int,
    rope: Rope,
    host: PageSource | None = None,
    summed: Summed | None = None,
) -> SequenceCache:
    """An empty cache for a prompt of `num_prompt_tokens`; layers are added as they arrive.

    Args:
        recipe: resolved for the model and the prompt's length.
        rope: the prompt's rotation.
        host: host memory for values that need not lie on the device (`placement`); None = all do.
        summed: see `Kit`; `shape` is then that of this rank's heads.
    """
    return RecipeCache(Kit(recipe, shape, rope, num_prompt_tokens, recipe.retrieval.build(), host, summed))


class RecipeCache:
    """See `SequenceCache`."""

    def __init__(self, kit: Kit) -> None:
        self.recipe = kit.recipe
        self.counter = ReadCounter()
        self.version = self.moves = 0
        self._read_nbytes = (0, 0)
        self._fixed: FixedPlaces | None = None
        self._sealing: Sealing | None = None
        self._may_share = True  # `_sealing` may still be made
        self._kit = kit
        self._recall: Recall | None = None
        self._recalls_in_steps: bool | None = None
        self._layers: dict[int, LayerCache] = {}
        self._waiting: dict[int, EncodedLayer] = {}

    def add_layer(self, encoded: EncodedLayer) -> None:
        """Take over a layer's tensors.

        Raises:
            FrameMismatch: a layer that is here already, or tensors other than the recipe's.
        """
        num_layers = self._kit.shape.num_layers
        known = encoded.layer in self._layers or encoded.layer in self._waiting
        if known or not 0 <= encoded.layer < num_layers:
            raise FrameMismatch(f"layer {encoded.layer} is here already or is none of the model's")
        check_tensors(encoded, self.recipe, self._kit.shape, self._kit.num_prompt_tokens)
        held = {part: {name: compact(t) for name, t in group.items()} for part, group in encoded.tensors.items()}
        self._waiting[encoded.layer] = EncodedLayer(encoded.layer, held)
        group = self.recipe.sharing.group(encoded.layer, num_layers)
        if group[0] in self._waiting:
            self._add_lead(self._waiting.pop(group[0]))
        for layer in [layer for layer in group if layer in self._waiting and group[0] in self._layers]:
            self._layers[layer] = LayerCache(self._kit, self._waiting.pop(layer), self._layers[group[0]])

    def _add_lead(self, encoded: EncodedLayer) -> None:
        """Take a layer that needs no other, and from which the others of its group read."""
        kit, plan = self._kit, recall_plan(self.recipe, self._kit.num_prompt_tokens)
        if plan is not None and encoded.layer == plan.layer:
            packed, first = encoded.tensors[Part.HIDDEN], self.recipe.window.sinks // plan.chunk
            hidden = HiddenRows(self.recipe, kit.shape, plan, packed, first, kit.host)
            dtype = torch.bfloat16 if self.recipe.window.dtype == "bfloat16" else None
            self._recall = Recall(hidden, kit.shape.layer_windows, dtype)
        self._layers[encoded.layer] = LayerCache(self._kit, encoded, None)

    def append(self, layer: int, k_pre: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """See `SequenceCache`."""
        recall = self._recall
        if recall is not None and layer > recall.plan.layer and recall.num_joining:
            count = recall.num_joining
            recall.append(layer, k[:count], v[:count])
            k_pre, k, v = k_pre[count:], k[count:], v[count:]
        self._layers[layer].append(k_pre, k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """See `SequenceCache`."""
        recall, one = self._recall, self._layers[layer]
        if recall is None or layer < recall.plan.layer:
            return one.attend(q, positions, self.counter)
        if layer > recall.plan.layer:
            return recall.attend(one, layer, q, positions, self.counter)
        self._catch_up()
        out, mass = one.attend_and_weigh(q, positions, self.counter)
        recall.choose(mass, positions, self.counter)
        return out

    def _catch_up(self) -> Recall | None:
        """What was recalled, in steps of a device as well; waits for those that nobody has asked for yet."""
        if self._recall is not None:
            self.counter.rows_recalled += self._recall.catch_up()
        return self._recall

    def recall(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `SequenceCache`."""
        recall = self._recall
        return recall.joining(like) if recall is not None and layer == recall.plan.layer else None

    @property
    def runs_apart(self) -> bool:
        """See `SequenceCache`."""
        if self._recall is None:
            return False
        if self._recalls_in_steps is None:
            self._recalls_in_steps = recalls_in_steps(self.layers(), self._recall)
        return not self._recalls_in_steps

    @property
    def rows_uncounted(self) -> int:
        """See `SequenceCache`."""
        return 0 if self._recall is None else self._recall.chunks.num_brought - self.counter.rows_recalled

    @property
    def most_rows_kept(self) -> int:
        """See `SequenceCache`."""
        return NEVER if self._recall is None else self._recall.plan.pass_rows

    def reserve(self, num_rows: int, like: Tensor) -> None:
        """See `SequenceCache`."""
        moved = self._recall is not None and not self.runs_apart and self._recall.reserve(like)
        try:
            if not self._layers[0].tail.has_room(num_rows):  # tails of all layers have as many rows
                for layer in self._others_first():
                    moved |= layer.tail.reserve(num_rows, like)
        finally:
            if moved:
                self.note_moved()

    def views(self) -> list[View]:
        """See `SequenceCache`."""
        layers, recall = self.layers(), None if self.runs_apart else self._recall
        whole = sum(one.read_nbytes() for one in layers) + (0 if recall is None else recall.most_read_nbytes)
        self._read_nbytes = (whole, sum(one.tail.row_nbytes for one in layers))
        self._fixed = FixedPlaces.of(self._kit, layers)
        regions = [None if recall is None else recall.region(number) for number in range(len(layers))]
        return [layer_view(layer, region) for layer, region in zip(layers, regions, strict=True)]

    def recall_view(self) -> RecallView | None:
        """See `SequenceCache`."""
        return None if self._recall is None or self.runs_apart else recall_view(self.layers(), self._recall)

    def begin_step(self) -> None:
        """See `SequenceCache`."""
        if self._recall is not None:
            self._recall.chunks.begin_step()

    def shift(self) -> Shift | None:
        """See `SequenceCache`."""
        return None if self._fixed is None else self._fixed.shift(self._layers[0], self._sealing)

    def redone(self) -> RedoneRow:
        """See `SequenceCache`."""
        return RedoneRow(self.layers(), self._recall)

    def layers(self) -> list[LayerCache]:
        """Of all layers, in order."""
        return [self._layers[layer] for layer in range(self._kit.shape.num_layers)]

    def _others_first(self) -> list[LayerCache]:
        """All layers, the first one last: what is asked of it alone is so of the others, even where memory ran out half
        way."""
        return [*(layer for number, layer in self._layers.items() if number), self._layers[0]]

    def note_moved(self) -> None:
        """See `SequenceCache`."""
        self.version += 1
        self.moves += 1

    def moving_tails(self) -> Sequence[Tail]:
        """See `SequenceCache`."""
        if not self._layers[0].tail.offset:  # blocks are sealed in all layers
            return ()
        return [layer.tail for layer in self._layers.values()]

    def advance(self, num_rows: int) -> None:
        """See `SequenceCache`."""
        for layer in self._layers.values():
            layer.tail.num_rows += num_rows  # no call: it comes once a layer, sequence and step
        whole, of_row = self._read_nbytes
        self.counter.bytes_read += whole + of_row * self._layers[0].tail.num_rows

    def chosen(self) -> list[KeptChoice]:
        """See `SequenceCache`."""
        return [layer.kept.copy() for layer in self.layers() if layer.kept is not None]

    def withdraw(self, position: int, chosen: Sequence[KeptChoice] = ()) -> None:
        """See `SequenceCache`."""
        for layer in self._layers.values():
            layer.tail.withdraw(position)
        recall = self._catch_up()
        if recall is not None:
            self.counter.rows_recalled -= recall.chunks.rows_since(position)
            undone = recall.undo(position)
            assert undone, "what a pass displaces stays until the next one"
        if chosen:
            kept = [layer.kept for layer in self.layers() if layer.kept is not None]
            for one, before in zip(kept, chosen, strict=True):
                one.put_back(before)
        self.note_moved()

    def rows_until_seal(self, position: int) -> int:
        """See `SequenceCache`."""
        return min(rows_until_seal(self.recipe, self._kit.num_prompt_tokens, position), self.most_rows_kept)

    def seal(self, next_position: int) -> None:
        """See `SequenceCache`."""
        recipe = self.recipe
        if not recipe.window.seal_block:
            return
        begin = self._layers[0].tail.begin
        end = sealed_end(recipe, self._kit.num_prompt_tokens, next_position)
        if recipe.budget.fixed:
            for layer in self._layers.values():
                layer.seal(end)
        elif end >= self._layers[0].tail.begin + recipe.block:
            self._seal_blocks(end)
        self.version += self._layers[0].tail.begin > begin

    def _seal_blocks(self, end: int) -> None:
        sealing, block = self.sealing(), self.recipe.block
        if sealing is None:
            self.moves += 1
            for layer in self._others_first():
                layer.seal(end)
            return
        while self._layers[0].tail.begin + block <= end:
            if not sealing.is_packed:
                if sealing.make_room(None):
                    self.moves += 1
                pack_blocks([sealing], own_angles(self._kit))
            sealing.seal()
            whole, of_row = self._read_nbytes
            self._read_nbytes = (whole + sealing.read_nbytes, of_row)

    def sealing(self) -> Sealing | None:
        """See `SequenceCache`."""
        if self._sealing is None and self._may_share:
            layers = self.layers()
            seals = bool(self.recipe.window.seal_block) and not self.recipe.budget.fixed
            # the kernels that pack blocks of many sequences know no other ranks
            self._may_share = seals and not (self._kit.summed is not None and self.recipe.key_codec.head_shared)
            if self._may_share and layers[0].tail.num_rows and runs(TRITON, layers[0].tail.device):
                self._sealing = Sealing.of(self._kit, layers)
                self._may_share = False
        return self._sealing

    def rows(self, begin: int, end: int) -> list[EncodedLayer]:
        """See `SequenceCache`."""
        rows = saved_rows([layer.tail for layer in self.layers()], begin, end)
        recall = self._catch_up()
        return rows if recall is None else recall.with_recalled(rows, begin, end)

    def put_rows(self, begin: int, layers: Sequence[EncodedLayer]) -> None:
        """See `SequenceCache`."""
        tails = [layer.tail for layer in self.layers()]
        num_rows = check_rows(tails, begin, layers, self._kit.shape, RECALLED if self._recall else ())
        done = 0
        recall = self._catch_up()
        if recall is not None:
            recall.put(begin, begin + num_rows, layers)
        while done < num_rows:
            count = min(self.rows_until_seal(begin + done), num_rows - done)
            put_saved_rows(tails, layers, done, done + count)
            done += count
            self.seal(begin + done)
        self.note_moved()

    @property
    def end(self) -> int:
        """See `SequenceCache`."""
        return self._layers[0].tail.end

    def truncate(self, end: int) -> bool:
        """See `SequenceCache`."""
        tails, num_prompt = [layer.tail for layer in self.layers()], self._kit.num_prompt_tokens
        self._catch_up()  # whoever goes on from here counts anew
        count = tails[0].end - end
        if count <= 0:
            return count == 0
        every, last = self.recipe.retrieval.select_every, tails[0].end - 1
        was_chosen = end % every == 0 or end // every == last // every
        was_sealed = sealed_end(self.recipe, num_prompt, last) > sealed_end(self.recipe, num_prompt, end)
        if was_sealed or not was_chosen or any(tail.num_rows < count for tail in tails):
            return False
        if self.recipe.window.seal_block and tails[0].num_rows - count < self.recipe.block:
            return False  # a block may have been packed ahead of rows that go
        if self._recall is not None and not self._recall.undo(end):
            return False
        for tail in tails:
            tail.num_rows -= count
        self.note_moved()
        return True

    def prepare_seal(self, next_position: int, most_layers: int) -> int:
        """See `SequenceCache`."""
        recipe, num_tokens = self.recipe, self._kit.num_prompt_tokens
        if not recipe.window.seal_block or recipe.budget.fixed:
            return 0
        if sealed_end(recipe, num_tokens, next_position) < self._layers[0].tail.begin + recipe.block:
            return 0
        count = 0
        for layer in self._layers.values():
            if count == most_layers:
                break
            count += layer.prepare_seal()
        return count

    def fork(self) -> SequenceCache:
        """See `SequenceCache`."""
        twin = RecipeCache(self._kit)
        twin._layers = {index: layer.fork() for index, layer in self._layers.items()}
        recall = self._catch_up()
        twin._recall = None if recall is None else recall.copy()
        return twin

    def tensors(self) -> Iterator[Tensor]:
        """See `SequenceCache`."""
        yield from self._shared_tensors()
        yield from self._own_tensors()

    def relocated(self) -> None:
        """See `SequenceCache`."""
        if self._sealing is not None:
            self._sealing.relocated()
        for values in self.host_values():
            values.relocated()
        self.note_moved()

    def _shared_tensors(self) -> Iterator[Tensor]:
        for one in self._waiting.values():
            for group in one.tensors.values():
                yield from group.values()
        for layer in self._layers.values():
            yield from layer.shared_tensors()
        if self._recall is not None:
            yield from self._recall.hidden.tensors()

    def _own_tensors(self) -> Iterator[Tensor]:
        if self._sealing is not None:
            yield from self._sealing.tensors()
        for layer in self._layers.values():
            yield from layer.own_tensors()
        if self._recall is not None:
            yield from self._recall.tensors()

    def shared_nbytes(self) -> int:
        """Bytes of what the prompt made."""
        return storage_nbytes(self._shared_tensors())

    def own_nbytes(self) -> int:
        """Bytes of the tail, spare capacity included, of blocks sealed here and of hot sets."""
        return storage_nbytes(self._own_tensors())

    def nbytes(self) -> int:
        """See `SequenceCache`."""
        return self.shared_nbytes() + self.own_nbytes()

    def host_nbytes(self) -> int:
        """See `SequenceCache`."""
        return sum(values.host_nbytes for values in self.host_values())

    def host_values(self) -> list[HostValues]:
        """See `SequenceCache`."""
        found = [layer.host_values for layer in self._layers.values()]
        if self._recall is not None:
            found.append(self._recall.hidden.host)
        return [values for values in found if values is not None]
