"""Points in the life of a kept request at which tests have a worker die or freeze."""

from __future__ import annotations

from kvsluice.tests.faults.rig.failpoints import Point

DECODE, SEQUENCES = "kvsluice.services.decode", "kvsluice.kvstore.sequences"
PREFILL = "kvsluice.services.prefill.publisher"

POINTS = {
    # the prompt arrives at decode
    "frame-acknowledged": Point(f"{DECODE}.receiver", "Receiver._take_frame", "after"),
    "frame-stored": Point(SEQUENCES, "SequenceWriter.put_frame", "after"),
    "manifest-unnamed": Point(SEQUENCES, "SequenceWriter._point_to", "before"),
    "manifest-kept": Point(SEQUENCES, "SequenceWriter.commit", "after"),
    "started": Point(f"{DECODE}.target", "EngineTarget.commit", "after"),
    # tokens are made
    "token-unsent": Point(f"{DECODE}.requests", "GatewayStream.add", "after"),
    "token-sent": Point(f"{DECODE}.requests", "GatewayStream.flush", "after"),
    "rows-unkept": Point(f"{DECODE}.keeper", "Keeper._keep_rows", "before"),
    "rows-unnamed": Point(SEQUENCES, "encode_continuation", "before"),
    "rows-kept": Point(f"{DECODE}.keeper", "Keeper._keep_rows", "after"),
    "ended": Point(f"{DECODE}.server", "DecodeService._end_keeping", "before"),
    # another worker goes on
    "claimed": Point(f"{DECODE}.restore", "claim_sequence", "after"),
    "found": Point(f"{DECODE}.restore", "find_sequence", "after"),
    "prompt-restored": Point(f"{DECODE}.restore", "_restore_prompt", "after"),
    "taken-over": Point(f"{DECODE}.keeper", "Keeper.take_over", "after"),
    # the prompt leaves prefill
    "frame-sent": Point(PREFILL, "Publisher._put", "after"),
    "manifest-unsent": Point(PREFILL, "Publisher._manifest", "before"),
}
