"""The one validator behind every front door. Runs before any compute; free of torch and of transport.

check_request   what can be said from the message alone
check_prompt    once the prompt is tokenized: lengths
choose_recipe   once a worker has told the model's shape: the recipe, resolved for this prompt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..compression.recipe import ModelShape, Recipe, Resolved, get_recipe, resolve
from ..errors import InvalidRequest, UnknownModel
from ..protos import generation_pb2 as pb
from ..protos import worker_pb2 as wpb

MAX_ID_CHARS = 128
MAX_CHAT_MESSAGES = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_NAME_CHARS = 64
MAX_SLOTS_JSON_CHARS = 16 * 1024
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 0.01
DURABILITIES = ("none", "handoff", "tokens")
ROLES = ("system", "user", "assistant")

T = TypeVar("T", int, None)

_UNSUPPORTED = ("tools", "response_format")


@dataclass(frozen=True)
class ServedModel:
    """What the validator knows of the model that is served.

    Attributes:
        name: the name that clients use.
        vocab_size: token ids are below it.
        max_model_len: tokens of prompt and answer together, at most.
        max_new_tokens: answer length of requests that name none, at most.
        default_recipe: recipe of requests that name none.
        has_chat_template: whether chat messages can be turned into a prompt.
        has_store: whether requests can be kept beyond the life of a worker.
        has_sessions: whether the gateway has the store, too.
        default_durability: of requests that name none.
    """

    name: str
    vocab_size: int
    max_model_len: int
    max_new_tokens: int
    default_recipe: str
    has_chat_template: bool
    has_store: bool = False
    has_sessions: bool = False
    default_durability: str = "none"


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose message is sound; its lengths and its recipe's fit are still open.

    Attributes:
        sampling: all fields but `max_tokens` are final.
        max_tokens: as asked for; None = as much as fits.
        input_field: the field that holds the prompt, for error messages.
        durability: none, handoff or tokens.
        recipe_given: the request names a recipe or slots, rather than have the server's default.
        session_id: the conversation that it continues or begins; None = none.
        session_turn: which turn of it this has to be, from 1; None = the next one.
    """

    request_id: str
    input_field: str
    prompt: str | None
    token_ids: tuple[int, ...] | None
    messages: tuple[dict[str, str], ...] | None
    sampling: wpb.Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    recipe: Recipe
    recipe_name: str
    durability: str = "none"
    recipe_given: bool = False
    session_id: str | None = None
    session_turn: int | None = None


def check_request(request: pb.GenerateRequest, model: ServedModel, default_seed: Callable[[], int]) -> CheckedRequest:
    """Check all that the message alone can tell.

    Args:
        default_seed: draws the seed of a request that brings none.

    Raises:
        InvalidRequest: names the field and what it allows. UnknownModel.
    """
    _check_id(request.request_id)
    if request.model and request.model != model.name:
        raise UnknownModel(f"model: {_shown(request.model)} is not served here; allowed: {model.name}")
    for name in _UNSUPPORTED:
        if getattr(request, name):
            raise InvalidRequest(name, "is not supported", "leave it out")
    if request.HasField("prompt_logprobs"):
        raise InvalidRequest("prompt_logprobs", "is not supported", "leave it out")
    field = request.WhichOneof("input")
    if field is None:
        raise InvalidRequest("prompt", "is missing", "one of prompt, token_ids, chat")
    max_tokens = _integer("max_tokens", request.sampling, 1, model.max_model_len - 1, None)
    recipe_name = request.recipe.name or model.default_recipe
    return CheckedRequest(
        request_id=request.request_id,
        input_field=field,
        prompt=_text("prompt", request.prompt) if field == "prompt" else None,
        token_ids=_token_ids(request.token_ids.ids, model) if field == "token_ids" else None,
        messages=_messages(request.chat, model) if field == "chat" else None,
        sampling=_sampling(request.sampling, model, max_tokens, default_seed),
        max_tokens=max_tokens,
        stop=_stops(request.sampling.stop),
        recipe=_recipe(recipe_name, request.recipe.slots_json),
        recipe_name=recipe_name,
        durability=_durability(request, model),
        recipe_given=bool(request.recipe.name or request.recipe.slots_json),
        session_id=_session(request, model),
        session_turn=request.session_turn if request.HasField("session_turn") else None,
    )


def check_prompt(checked: CheckedRequest, num_prompt_tokens: int, model: ServedModel) -> wpb.Sampling:
    """Check the lengths of a tokenized prompt. Returns the sampling settings, `max_tokens` filled in."""
    if num_prompt_tokens == 0:
        raise InvalidRequest(checked.input_field, "is empty", "at least one token")
    room = model.max_model_len - num_prompt_tokens
    if room < 1:
        raise InvalidRequest(
            checked.input_field,
            f"has {num_prompt_tokens} tokens",
            f"at most {model.max_model_len - 1}, so that one more fits into the model's {model.max_model_len}",
        )
    if checked.max_tokens is not None and checked.max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens", f"got {checked.max_tokens} after a prompt of {num_prompt_tokens}", f"1 to {room}"
        )
    sampling = wpb.Sampling()
    sampling.CopyFrom(checked.sampling)
    sampling.max_tokens = checked.max_tokens or min(room, model.max_new_tokens)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            "sampling.min_tokens", f"got {sampling.min_tokens}", f"0 to max_tokens ({sampling.max_tokens})"
        )
    return sampling


def choose_recipe(
    checked: CheckedRequest, num_prompt_tokens: int, shape: ModelShape, profile: Mapping[str, Any]
) -> Resolved:
    """The recipe as it will run for this prompt. Raises `InvalidRecipe` where its slots do not fit the model."""
    return resolve(checked.recipe, shape, num_prompt_tokens, profile)


def check_input_size(checked: CheckedRequest, model: ServedModel, longest_token_chars: int = 128) -> None:
    """Refuse texts that cannot fit whatever their tokens are, before time goes into tokenizing them."""
    texts = [checked.prompt or ""] + [m["content"] for m in checked.messages or ()]
    limit = model.max_model_len * longest_token_chars
    if sum(map(len, texts)) > limit:
        raise InvalidRequest(
            checked.input_field, f"has more than {limit} characters", f"at most {model.max_model_len - 1} tokens"
        )


def _shown(value: object) -> str:
    return repr(value)[:80]


def _check_id(text: str, field: str = "request_id") -> None:
    if len(text) > MAX_ID_CHARS or not all(33 <= ord(c) <= 126 for c in text):
        raise InvalidRequest(
            field, "is too long or holds odd characters", f"at most {MAX_ID_CHARS} printable ASCII characters"
        )


def _text(field: str, text: str) -> str:
    if not text:
        raise InvalidRequest(field, "is empty", "a text of at least one token")
    if "\0" in text:
        raise InvalidRequest(field, "holds a NUL character", "text without NUL")
    return text


def _token_ids(ids: Sequence[int], model: ServedModel) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequest("token_ids", "is empty", "at least one id")
    if len(ids) >= model.max_model_len:
        raise InvalidRequest("token_ids", f"has {len(ids)} tokens", f"at most {model.max_model_len - 1}")
    _check_vocabulary("token_ids", ids, model)
    return tuple(ids)


def _check_vocabulary(field: str, ids: Sequence[int], model: ServedModel) -> None:
    for token_id in ids:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(field, f"holds {token_id}", f"ids from 0 to {model.vocab_size - 1}")


def _messages(chat: pb.ChatMessages, model: ServedModel) -> tuple[dict[str, str], ...]:
    if not model.has_chat_template:
        raise InvalidRequest("chat", "the model has no chat template", "prompt or token_ids")
    if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
        raise InvalidRequest("chat", f"has {len(chat.messages)} messages", f"1 to {MAX_CHAT_MESSAGES} messages")
    messages = []
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{i}].role", f"got {_shown(message.role)}", ", ".join(ROLES))
        content = _text(f"chat.messages[{i}].content", message.content)
        messages.append({"role": message.role, "content": content})
    return tuple(messages)


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("sampling.stop", f"has {len(stops)} strings", f"at most {MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS or "\0" in stop:
            raise InvalidRequest(
                "sampling.stop",
                "holds a string that is empty, too long or has a NUL",
                f"1 to {MAX_STOP_CHARS} characters without NUL",
            )
    return tuple(stops)


def _session(request: pb.GenerateRequest, model: ServedModel) -> str | None:
    if not request.session_id:
        if request.HasField("session_turn"):
            raise InvalidRequest("session_turn", "has no session", "only with session_id")
        return None
    _check_id(request.session_id, "session_id")
    if request.HasField("session_turn") and not request.session_turn:
        raise InvalidRequest("session_turn", "got 0", "at least 1, or leave it out")
    if not model.has_store or not model.has_sessions:
        raise InvalidRequest("session_id", "needs a store, which the service has not", "leave it out")
    if request.sampling.HasField("n") and request.sampling.n != 1:
        raise InvalidRequest("sampling.n", f"got {request.sampling.n} in a session", "1")
    return request.session_id


def _durability(request: pb.GenerateRequest, model: ServedModel) -> str:
    if request.session_id:
        if request.durability not in ("", "tokens"):
            raise InvalidRequest("durability", f"got {_shown(request.durability)} in a session", "tokens")
        return "tokens"
    level = request.durability or model.default_durability
    if level not in DURABILITIES:
        raise InvalidRequest("durability", f"got {_shown(level)}", ", ".join(DURABILITIES))
    if level != "none" and not model.has_store:
        raise InvalidRequest("durability", f"{level} needs a store, and no decode worker has one", "none")
    return level


def _recipe(name: str, slots_json: str) -> Recipe:
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequest("recipe.name", "is too long", f"at most {MAX_NAME_CHARS} characters")
    if len(slots_json) > MAX_SLOTS_JSON_CHARS:
        raise InvalidRequest("recipe.slots_json", "is too long", f"at most {MAX_SLOTS_JSON_CHARS} characters")
    return get_recipe(name, slots_json)


def _number(
    name: str, params: pb.SamplingParams, low: float, high: float, default: float, low_excluded: bool = False
) -> float:
    """A floating-point field of the sampling parameters, or its default."""
    if not params.HasField(name):
        return default
    value = float(getattr(params, name))
    if not math.isfinite(value) or not low <= value <= high or (low_excluded and value == low):
        allowed = f"above {low:g} and at most {high:g}" if low_excluded else f"{low:g} to {high:g}"
        raise InvalidRequest(f"sampling.{name}", f"got {value:g}", allowed)
    # adding zero turns -0.0 into 0.0
    return value + 0.0


def _integer(name: str, params: pb.SamplingParams, low: int, high: int, default: T) -> int | T:
    if not params.HasField(name):
        return default
    value = int(getattr(params, name))
    if not low <= value <= high:
        raise InvalidRequest(f"sampling.{name}", f"got {value}", f"{low} to {high}")
    return value


def _sampling(
    params: pb.SamplingParams, model: ServedModel, max_tokens: int | None, default_seed: Callable[[], int]
) -> wpb.Sampling:
    seed = _integer("seed", params, 0, MAX_SEED, None)
    temperature = _number("temperature", params, 0.0, 2.0, 1.0)
    if 0 < temperature < MIN_TEMPERATURE:
        # logits divided by less overflow
        raise InvalidRequest("sampling.temperature", f"got {temperature:g}", f"0 (greedy) or {MIN_TEMPERATURE:g} to 2")
    sampling = wpb.Sampling(
        temperature=temperature,
        top_p=_number("top_p", params, 0.0, 1.0, 1.0, low_excluded=True),
        top_k=_integer("top_k", params, 0, model.vocab_size, 0),
        min_p=_number("min_p", params, 0.0, 1.0, 0.0),
        repetition_penalty=_number("repetition_penalty", params, 0.01, 10.0, 1.0),
        presence_penalty=_number("presence_penalty", params, -2.0, 2.0, 0.0),
        frequency_penalty=_number("frequency_penalty", params, -2.0, 2.0, 0.0),
        seed=default_seed() if seed is None else seed,
        min_tokens=_integer("min_tokens", params, 0, max_tokens or model.max_model_len - 1, 0),
        ignore_eos=params.ignore_eos,
        n=_integer("n", params, 1, MAX_CHOICES, 1),
    )
    logprobs = _integer("logprobs", params, 0, min(MAX_LOGPROBS, model.vocab_size), None)
    if logprobs is not None:
        sampling.logprobs = logprobs
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            "sampling.stop_token_ids", f"has {len(params.stop_token_ids)} ids", f"at most {MAX_STOP_TOKENS}"
        )
    _check_vocabulary("sampling.stop_token_ids", params.stop_token_ids, model)
    sampling.stop_token_ids.extend(params.stop_token_ids)
    if len(params.logit_bias) > MAX_BIASES:
        raise InvalidRequest("sampling.logit_bias", f"has {len(params.logit_bias)} entries", f"at most {MAX_BIASES}")
    _check_vocabulary("sampling.logit_bias", list(params.logit_bias), model)
    for token_id, bias in params.logit_bias.items():
        if not math.isfinite(bias) or not -100.0 <= bias <= 100.0:
            raise InvalidRequest("sampling.logit_bias", f"got {bias:g} for id {token_id}", "-100 to 100")
        sampling.logit_bias[token_id] = bias
    return sampling
