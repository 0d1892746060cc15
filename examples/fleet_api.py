"""What the fleet of ray_serve.py answers over HTTP. It needs no Ray, and can be tried without."""

from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from server_errors import RETRY_UNKNOWN, Problem, for_clients, problem_of
from server_options import LARGEST_CHUNK, LONGEST_NAME
from server_sound import pcm, wav_header
from starlette.exceptions import HTTPException

SAMPLE_RATE = 24000
LONGEST_TEXT = 20_000  # characters; about twenty minutes of speech
_CODES = {400: "invalid_request", 404: "voice_not_found", 429: "busy", 503: "unavailable"}


class SpeechBody(BaseModel):
    """The body of a request for speech, as OpenAI has it, and what Chatterbox can do beyond."""

    model_config = ConfigDict(extra="forbid", strict=True)  # a number is a number of JSON

    input: str = Field(max_length=LONGEST_TEXT)
    voice: str | None = Field(None, max_length=LONGEST_NAME)
    model: str = Field("chatterbox", max_length=200)  # one is loaded, whatever it is called here
    response_format: Literal["wav", "pcm"] = "wav"
    seed: int | None = Field(None, ge=0, lt=2**63)
    language_id: str | None = Field(None, max_length=35)  # the longest tag that is in use
    exaggeration: FiniteFloat | None = Field(None, ge=0, le=2)
    max_new_tokens: int | None = None
    chunking: Literal["auto", "fixed"] | None = None
    first_chunk: int | None = Field(None, ge=1, le=LARGEST_CHUNK)
    max_chunk: int | None = Field(None, ge=1, le=LARGEST_CHUNK)
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    min_p: FiniteFloat | None = None
    top_k: int | None = None
    repetition_penalty: FiniteFloat | None = None
    cfg_weight: FiniteFloat | None = None

    def options(self) -> dict[str, Any]:
        """What goes to the scheduler beside text and voice."""
        return self.model_dump(exclude={"input", "voice", "model", "response_format"}, exclude_none=True)


def new_api() -> FastAPI:
    """An app without routes, whose errors are error objects that repeat nothing of a request.

    The pages of /docs load scripts from elsewhere; /openapi.json is there.
    """
    api = FastAPI(title="A fleet of Chatterbox on kvcache", docs_url=None, redoc_url=None)
    for kind in (Problem, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, _answer)
    return api


async def _answer(request: Request, error: Exception) -> Response:
    return problem_of(error, SpeechBody.model_fields, request).response()


async def answer(asked: SpeechBody, chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """The response that a request gets.

    Args:
        asked: the request.
        chunks: with ``audio`` ``[samples]``, ``replica``, ``prefix`` and ``retried``; or one with ``status``, ``reason`` and perhaps
            ``retry_after``, seconds.

    Raises:
        Problem: for that one.
    """
    first = await anext(chunks, None)  # so that an error still is a status
    if first is not None and "status" in first:
        status = first["status"]
        retry = {"Retry-After": str(first.get("retry_after", RETRY_UNKNOWN))} if status in (429, 503) else None
        raise Problem(status, for_clients(first["reason"], SpeechBody.model_fields), _CODES[status], retry)
    names = ("replica", "prefix", "retried")
    headers = {} if first is None else {f"X-{name}": str(first[name]) for name in names}

    async def body() -> AsyncIterator[bytes]:
        if asked.response_format == "wav":
            yield wav_header(SAMPLE_RATE)
        if first is not None:
            yield pcm(first["audio"])
        async for chunk in chunks:  # an error cuts the response short of its end, which a client notices
            yield pcm(chunk["audio"])

    return StreamingResponse(body(), media_type=f"audio/{asked.response_format}", headers=headers)
