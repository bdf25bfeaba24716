from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KEYS: _ClassVar[Kind]
    VALUES: _ClassVar[Kind]
    BASIS: _ClassVar[Kind]
    OUTLIERS: _ClassVar[Kind]
    POSITIONS: _ClassVar[Kind]
    HIDDEN: _ClassVar[Kind]
    TAIL: _ClassVar[Kind]
    PACKED: _ClassVar[Kind]

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    INT8: _ClassVar[DType]
    INT32: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT8_E4M3: _ClassVar[DType]
KIND_UNSPECIFIED: Kind
KEYS: Kind
VALUES: Kind
BASIS: Kind
OUTLIERS: Kind
POSITIONS: Kind
HIDDEN: Kind
TAIL: Kind
PACKED: Kind
DTYPE_UNSPECIFIED: DType
UINT8: DType
INT8: DType
INT32: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT32: DType
FLOAT8_E4M3: DType

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "kind", "layer", "begin", "total", "index", "layer_tensors")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_TENSORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    kind: Kind
    layer: int
    begin: int
    total: int
    index: int
    layer_tensors: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., layer: _Optional[int] = ..., begin: _Optional[int] = ..., total: _Optional[int] = ..., index: _Optional[int] = ..., layer_tensors: _Optional[int] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("format_version", "request_id", "epoch", "model_fingerprint", "recipe_fingerprint", "kind", "layer_begin", "layer_end", "token_begin", "token_end", "tensors", "payload_bytes", "tenant")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    request_id: str
    epoch: int
    model_fingerprint: str
    recipe_fingerprint: str
    kind: Kind
    layer_begin: int
    layer_end: int
    token_begin: int
    token_end: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    payload_bytes: int
    tenant: str
    def __init__(self, format_version: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., recipe_fingerprint: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., token_begin: _Optional[int] = ..., token_end: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., payload_bytes: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class ManifestEntry(_message.Message):
    __slots__ = ("key", "size", "xxh3", "kind", "layer_begin", "layer_end")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    key: str
    size: int
    xxh3: int
    kind: Kind
    layer_begin: int
    layer_end: int
    def __init__(self, key: _Optional[str] = ..., size: _Optional[int] = ..., xxh3: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("token_id", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format_version", "request_id", "epoch", "tenant", "model_fingerprint", "recipe_fingerprint", "recipe_json", "prompt_ids", "choices", "seed", "frames")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    request_id: str
    epoch: int
    tenant: str
    model_fingerprint: str
    recipe_fingerprint: str
    recipe_json: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceState]
    seed: int
    frames: _containers.RepeatedCompositeFieldContainer[ManifestEntry]
    def __init__(self, format_version: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tenant: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., recipe_fingerprint: _Optional[str] = ..., recipe_json: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[_Union[ChoiceState, _Mapping]]] = ..., seed: _Optional[int] = ..., frames: _Optional[_Iterable[_Union[ManifestEntry, _Mapping]]] = ...) -> None: ...

class ChoiceState(_message.Message):
    __slots__ = ("index", "emitted", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EMITTED_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    emitted: _containers.RepeatedCompositeFieldContainer[SampledToken]
    finish_reason: str
    def __init__(self, index: _Optional[int] = ..., emitted: _Optional[_Iterable[_Union[SampledToken, _Mapping]]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class RowsEntry(_message.Message):
    __slots__ = ("choice", "token_begin", "token_end", "frames")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    choice: int
    token_begin: int
    token_end: int
    frames: _containers.RepeatedCompositeFieldContainer[ManifestEntry]
    def __init__(self, choice: _Optional[int] = ..., token_begin: _Optional[int] = ..., token_end: _Optional[int] = ..., frames: _Optional[_Iterable[_Union[ManifestEntry, _Mapping]]] = ...) -> None: ...

class ContinuedChoice(_message.Message):
    __slots__ = ("token_ids", "finish_reason")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("format_version", "session_id", "tenant", "model_fingerprint", "recipe_name", "recipe_json", "is_chat", "epoch", "num_turns", "prompt_ids", "history_ids", "begun_unix_s", "used_unix_s", "stored_bytes")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_NAME_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    IS_CHAT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_IDS_FIELD_NUMBER: _ClassVar[int]
    BEGUN_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    USED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    session_id: str
    tenant: str
    model_fingerprint: str
    recipe_name: str
    recipe_json: str
    is_chat: bool
    epoch: int
    num_turns: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    history_ids: _containers.RepeatedScalarFieldContainer[int]
    begun_unix_s: float
    used_unix_s: float
    stored_bytes: int
    def __init__(self, format_version: _Optional[int] = ..., session_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., recipe_name: _Optional[str] = ..., recipe_json: _Optional[str] = ..., is_chat: _Optional[bool] = ..., epoch: _Optional[int] = ..., num_turns: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., history_ids: _Optional[_Iterable[int]] = ..., begun_unix_s: _Optional[float] = ..., used_unix_s: _Optional[float] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("format_version", "request_id", "epoch", "tenant", "model_fingerprint", "recipe_fingerprint", "base", "base_xxh3", "version", "choices", "rows")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    BASE_XXH3_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    request_id: str
    epoch: int
    tenant: str
    model_fingerprint: str
    recipe_fingerprint: str
    base: str
    base_xxh3: int
    version: int
    choices: _containers.RepeatedCompositeFieldContainer[ContinuedChoice]
    rows: _containers.RepeatedCompositeFieldContainer[RowsEntry]
    def __init__(self, format_version: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., tenant: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., recipe_fingerprint: _Optional[str] = ..., base: _Optional[str] = ..., base_xxh3: _Optional[int] = ..., version: _Optional[int] = ..., choices: _Optional[_Iterable[_Union[ContinuedChoice, _Mapping]]] = ..., rows: _Optional[_Iterable[_Union[RowsEntry, _Mapping]]] = ...) -> None: ...
