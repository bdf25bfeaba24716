"""A door of the service, as the driver knocks at it, and the gRPC one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from ..client import AsyncClient, Connecting, ModelInfo, Options, Prompt

INFO_TIMEOUT_S = 30.0

OnTokens = Callable[[int], None]
"""Told how many tokens a message brought, as soon as it is there."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent.

    Attributes:
        max_tokens: of the answer; it is that long where `ignore_eos` holds.
        session_id: of the service's own sessions, or "".
    """

    prompt: Prompt
    max_tokens: int
    recipe: str
    session_id: str
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a finished request says of itself.

    Attributes:
        token_ids: of the answer; None where the door does not tell.
        effective: the recipe that ran, which for short prompts is not the one asked for; "" where the door does not
            tell.
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...] | None = None
    effective: str = ""


class Transport(Protocol):
    """One door. `run` may be cancelled at any time, and the request then ends at the service as well.

    Every failure raises an error of `kvsluice.errors`.
    """

    async def run(self, request: Request, on_tokens: OnTokens) -> Answer: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, the same for all requests.

    Attributes:
        model: "" = the server's.
        ignore_eos: answers are as long as asked for.
    """

    model: str = ""
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class GrpcTransport:
    """`kvsluice.v1.Generation` through the project's own client.

    Args:
        address: host:port.
        connecting: key and TLS.

    Raises:
        KvsluiceError: the address has no port, or key and TLS cannot be used.
    """

    def __init__(self, address: str, sampling: Sampling, connecting: Connecting | None = None) -> None:
        # requests bring their own deadlines
        self._client = AsyncClient(address, timeout_s=INFO_TIMEOUT_S, **(connecting or {}))
        self._sampling = sampling

    async def model_info(self) -> ModelInfo:
        """What is served."""
        return await self._client.model_info()

    async def run(self, request: Request, on_tokens: OnTokens) -> Answer:
        stream = self._client.stream(request.prompt, **self._options(request))
        try:
            async for chunk in stream:
                if chunk.token_ids:
                    on_tokens(len(chunk.token_ids))
        finally:
            # without effect behind the end of the stream
            stream.cancel()
        done = stream.completion
        usage = done.usage
        return Answer(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            done.choices[0].token_ids,
            done.recipe.effective,
        )

    def _options(self, request: Request) -> Options:
        sampling = self._sampling
        given = {
            "model": sampling.model,
            "recipe": request.recipe,
            "session_id": request.session_id,
            "timeout_s": request.deadline_s,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "ignore_eos": sampling.ignore_eos,
            "seed": sampling.seed,
        }
        return cast(Options, {name: value for name, value in given.items() if value != ""})

    async def close(self) -> None:
        await self._client.close()
