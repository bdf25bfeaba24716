from kvsluice.protos import frame_pb2 as _frame_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "role", "model", "model_fingerprint", "model_shape_json", "profile_json", "capacity_bytes", "free_bytes", "running", "waiting", "vocab_size", "pending_tokens", "host_capacity_bytes", "host_free_bytes", "has_store", "tiers", "protocol", "prefix_chunk_tokens", "prefix_capacity_bytes", "prefix_used_bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHAPE_JSON_FIELD_NUMBER: _ClassVar[int]
    PROFILE_JSON_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HAS_STORE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    model: str
    model_fingerprint: str
    model_shape_json: str
    profile_json: str
    capacity_bytes: int
    free_bytes: int
    running: int
    waiting: int
    vocab_size: int
    pending_tokens: int
    host_capacity_bytes: int
    host_free_bytes: int
    has_store: bool
    tiers: TierSnapshot
    protocol: int
    prefix_chunk_tokens: int
    prefix_capacity_bytes: int
    prefix_used_bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., model_shape_json: _Optional[str] = ..., profile_json: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., vocab_size: _Optional[int] = ..., pending_tokens: _Optional[int] = ..., host_capacity_bytes: _Optional[int] = ..., host_free_bytes: _Optional[int] = ..., has_store: _Optional[bool] = ..., tiers: _Optional[_Union[TierSnapshot, _Mapping]] = ..., protocol: _Optional[int] = ..., prefix_chunk_tokens: _Optional[int] = ..., prefix_capacity_bytes: _Optional[int] = ..., prefix_used_bytes: _Optional[int] = ...) -> None: ...

class TierSnapshot(_message.Message):
    __slots__ = ("device_capacity_bytes", "device_used_bytes", "device_sequences", "host_capacity_bytes", "host_used_bytes", "host_sequences", "store_capacity_bytes", "store_used_bytes", "store_sequences", "preemptions", "resumes", "device_to_host_bytes", "host_to_device_bytes", "store_writes", "store_reads", "host_to_store_bytes", "store_to_host_bytes", "store_failures", "kept_sessions", "kept_session_bytes", "session_hits", "session_misses", "store_cache_used_bytes", "store_cache_hits", "store_cache_misses")
    DEVICE_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    HOST_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STORE_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TO_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_TO_DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_WRITES_FIELD_NUMBER: _ClassVar[int]
    STORE_READS_FIELD_NUMBER: _ClassVar[int]
    HOST_TO_STORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_TO_HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_FAILURES_FIELD_NUMBER: _ClassVar[int]
    KEPT_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KEPT_SESSION_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSION_HITS_FIELD_NUMBER: _ClassVar[int]
    SESSION_MISSES_FIELD_NUMBER: _ClassVar[int]
    STORE_CACHE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    STORE_CACHE_MISSES_FIELD_NUMBER: _ClassVar[int]
    device_capacity_bytes: int
    device_used_bytes: int
    device_sequences: int
    host_capacity_bytes: int
    host_used_bytes: int
    host_sequences: int
    store_capacity_bytes: int
    store_used_bytes: int
    store_sequences: int
    preemptions: int
    resumes: int
    device_to_host_bytes: int
    host_to_device_bytes: int
    store_writes: int
    store_reads: int
    host_to_store_bytes: int
    store_to_host_bytes: int
    store_failures: int
    kept_sessions: int
    kept_session_bytes: int
    session_hits: int
    session_misses: int
    store_cache_used_bytes: int
    store_cache_hits: int
    store_cache_misses: int
    def __init__(self, device_capacity_bytes: _Optional[int] = ..., device_used_bytes: _Optional[int] = ..., device_sequences: _Optional[int] = ..., host_capacity_bytes: _Optional[int] = ..., host_used_bytes: _Optional[int] = ..., host_sequences: _Optional[int] = ..., store_capacity_bytes: _Optional[int] = ..., store_used_bytes: _Optional[int] = ..., store_sequences: _Optional[int] = ..., preemptions: _Optional[int] = ..., resumes: _Optional[int] = ..., device_to_host_bytes: _Optional[int] = ..., host_to_device_bytes: _Optional[int] = ..., store_writes: _Optional[int] = ..., store_reads: _Optional[int] = ..., host_to_store_bytes: _Optional[int] = ..., store_to_host_bytes: _Optional[int] = ..., store_failures: _Optional[int] = ..., kept_sessions: _Optional[int] = ..., kept_session_bytes: _Optional[int] = ..., session_hits: _Optional[int] = ..., session_misses: _Optional[int] = ..., store_cache_used_bytes: _Optional[int] = ..., store_cache_hits: _Optional[int] = ..., store_cache_misses: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop_token_ids", "min_tokens", "ignore_eos", "logprobs", "n")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_tokens: int
    ignore_eos: bool
    logprobs: int
    n: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "tenant", "prompt_ids", "recipe_json", "sampling", "decode_address", "resumed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    tenant: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    recipe_json: str
    sampling: Sampling
    decode_address: str
    resumed: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tenant: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., recipe_json: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., decode_address: _Optional[str] = ..., resumed: _Optional[bool] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_tokens", "shipped")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_FIELD_NUMBER: _ClassVar[int]
    first_tokens: FirstTokens
    shipped: Shipped
    def __init__(self, first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., shipped: _Optional[_Union[Shipped, _Mapping]] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("choices", "queue_s", "prefill_s", "cached_tokens")
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[_frame_pb2.ChoiceState]
    queue_s: float
    prefill_s: float
    cached_tokens: int
    def __init__(self, choices: _Optional[_Iterable[_Union[_frame_pb2.ChoiceState, _Mapping]]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Shipped(_message.Message):
    __slots__ = ("payload_bytes", "frames", "handoff_s", "exposed_s")
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    frames: int
    handoff_s: float
    exposed_s: float
    def __init__(self, payload_bytes: _Optional[int] = ..., frames: _Optional[int] = ..., handoff_s: _Optional[float] = ..., exposed_s: _Optional[float] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("request_id", "epoch", "tenant", "num_prompt_tokens", "recipe_json", "sampling", "credits", "keeping", "sent", "history_tokens", "from_store", "trace")
    class TraceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    KEEPING_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    HISTORY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FROM_STORE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    tenant: str
    num_prompt_tokens: int
    recipe_json: str
    sampling: Sampling
    credits: int
    keeping: Keeping
    sent: _containers.RepeatedCompositeFieldContainer[_frame_pb2.ContinuedChoice]
    history_tokens: int
    from_store: bool
    trace: _containers.ScalarMap[str, str]
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tenant: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., recipe_json: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., credits: _Optional[int] = ..., keeping: _Optional[_Union[Keeping, _Mapping]] = ..., sent: _Optional[_Iterable[_Union[_frame_pb2.ContinuedChoice, _Mapping]]] = ..., history_tokens: _Optional[int] = ..., from_store: _Optional[bool] = ..., trace: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Keeping(_message.Message):
    __slots__ = ("keep_every", "end_ttl_s")
    KEEP_EVERY_FIELD_NUMBER: _ClassVar[int]
    END_TTL_S_FIELD_NUMBER: _ClassVar[int]
    keep_every: int
    end_ttl_s: float
    def __init__(self, keep_every: _Optional[int] = ..., end_ttl_s: _Optional[float] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("request_id", "epoch", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    tokens: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "epoch", "choice", "keep")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    choice: int
    keep: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., choice: _Optional[int] = ..., keep: _Optional[bool] = ...) -> None: ...

class ToDecode(_message.Message):
    __slots__ = ("open", "credit", "cancel")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    open: Open
    credit: Credit
    cancel: Cancel
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("request_id", "epoch", "error_type", "message", "field", "allowed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    error_type: str
    message: str
    field: str
    allowed: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., error_type: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., allowed: _Optional[str] = ...) -> None: ...

class TokenEntry(_message.Message):
    __slots__ = ("request_id", "epoch", "choice", "first_index", "tokens", "finish_reason", "stop_match")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_MATCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    choice: int
    first_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_frame_pb2.SampledToken]
    finish_reason: str
    stop_match: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., choice: _Optional[int] = ..., first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_frame_pb2.SampledToken, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_match: _Optional[str] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[TokenEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[TokenEntry, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("request_id", "epoch", "resident_bytes", "bytes_read", "steps", "stored_bytes", "kept", "rows_recalled")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    ROWS_RECALLED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    resident_bytes: int
    bytes_read: int
    steps: int
    stored_bytes: int
    kept: bool
    rows_recalled: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., bytes_read: _Optional[int] = ..., steps: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., kept: _Optional[bool] = ..., rows_recalled: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("request_id", "epoch", "recomputed_tokens", "recomputed_prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    recomputed_tokens: int
    recomputed_prompt_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., recomputed_prompt_tokens: _Optional[int] = ...) -> None: ...

class FromDecode(_message.Message):
    __slots__ = ("opened", "failed", "tokens", "finished", "resumed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    failed: Failed
    tokens: TokenBatch
    finished: Finished
    resumed: Resumed
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., tokens: _Optional[_Union[TokenBatch, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ...) -> None: ...

class FramePut(_message.Message):
    __slots__ = ("frame", "manifest")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    manifest: bytes
    def __init__(self, frame: _Optional[bytes] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class FrameAck(_message.Message):
    __slots__ = ("index", "committed")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    index: int
    committed: bool
    def __init__(self, index: _Optional[int] = ..., committed: _Optional[bool] = ...) -> None: ...
