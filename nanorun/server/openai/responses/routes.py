"""/v1/responses: to ask, and to look at, cancel and forget what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError, invalid, to_api_error
from nanorun.server.openai.responses.body import ItemsQuery, ResponsesRequest
from nanorun.server.openai.responses.items import kind_of
from nanorun.server.openai.responses.offered import OfferedTools, read_tools
from nanorun.server.openai.responses.store import ResponseStore, Stored
from nanorun.server.openai.responses.writer import ResponsesWriter
from nanorun.server.record import RequestRecord, record_of
from nanorun.server.service import Service

Item = dict[str, Any]


class Responses:
    """The responses of one endpoint: those that are kept, and those that are made now.

    Args:
        service: What answers.
        store: What is kept.
    """

    def __init__(self, service: Service, store: ResponseStore) -> None:
        self._service = service
        self._store = store
        self._made: WeakValueDictionary[str, ResponsesWriter] = WeakValueDictionary()
        """Those that are made now, by id, as long as somebody makes them."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Those that are made in the background."""

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer, whole, as a stream, or in the background."""
        self._service.check_model(body.model)
        self._check_background(body)
        own = await self._resolved(body.own_items())
        tools = read_tools(body.tools or ())
        asked = await self._asked(body, own, tools)

        async def save(response: dict[str, Any]) -> bool:
            return await asyncio.to_thread(self._store.save, response, own)

        writer = ResponsesWriter(
            self._service.names.name, asked, body, tools, save if body.is_stored else None
        )
        self._made[writer.id] = writer
        if body.background:
            return JSONResponse(self._begin(asked, writer, record_of(request.scope)))
        return await self._service.respond(request, asked, writer, stream=bool(body.stream))

    async def count_tokens(self, body: ResponsesRequest) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        self._service.check_model(body.model)
        own = await self._resolved(body.own_items())
        asked = await self._asked(body, own, read_tools(body.tools or ()))
        n_tokens = await self._service.client.count_tokens(asked.prompt, asked.options)
        return {"object": "response.input_tokens", "input_tokens": n_tokens}

    async def _asked(
        self, body: ResponsesRequest, own: Sequence[Item], tools: OfferedTools
    ) -> Asked:
        conversation = [*await self._earlier(body.previous_response_id), *own]
        return body.to_asked(conversation, tools, default_think=self._service.settings.think)

    async def get(self, response_id: str) -> dict[str, Any]:
        """A response, finished or as far as it is."""
        writer = self._made.get(response_id)
        if writer is not None and not writer.is_settled:
            return writer.now()
        return (await self._kept(response_id)).response

    async def delete(self, response_id: str) -> dict[str, Any]:
        """Forget a response."""
        if not await asyncio.to_thread(self._store.delete, response_id):
            raise _unknown(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """End a response that is made now; one that has finished stays as it is."""
        for generation in self._service.streams.get(response_id, ()):
            await generation.cancel()
        return await self.get(response_id)

    async def input_items(self, response_id: str, query: ItemsQuery) -> dict[str, Any]:
        """What a response was asked, without what came before."""
        items = (await self._kept(response_id)).items
        return _page(items, query)

    async def close(self) -> None:
        """End what is made in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._store.close()

    def _check_background(self, body: ResponsesRequest) -> None:
        if not body.background:
            return
        if body.stream:
            why = "a response in the background is asked for (GET), not streamed"
            raise ApiError(400, f"background: {why}", code="unsupported_parameter", param="stream")
        if not body.is_stored:
            why = "a response in the background must be stored"
            raise invalid("background", why)

    def _begin(
        self, asked: Asked, writer: ResponsesWriter, record: RequestRecord
    ) -> dict[str, Any]:
        """Make a response that nobody waits for."""

        async def make() -> None:
            try:
                await self._service.complete(asked, writer, record)
            except Exception as error:
                writer.error = to_api_error(error)
                await writer.settle()

        self._service.admission.check(asked.n_answers, key=record.key, n_bytes=record.n_body_bytes)
        task = asyncio.create_task(make())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return writer.now()

    async def _kept(self, response_id: str) -> Stored:
        stored = await asyncio.to_thread(self._store.get, response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored

    async def _earlier(self, previous_id: str | None) -> list[Item]:
        """The conversation that led to a response, and what it said."""
        if previous_id is None:
            return []
        items = await asyncio.to_thread(self._store.conversation, previous_id)
        if items is None:
            why = f"there is no response {previous_id!r}, or no more what led to it"
            raise ApiError(
                400, f"previous_response_id: {why}; send the whole conversation as input",
                code="previous_response_not_found", param="previous_response_id",
            )  # fmt: skip
        return items

    async def _resolved(self, items: Sequence[Item]) -> list[Item]:
        """Items where those that only refer to others are replaced by them."""
        made = []
        for i, item in enumerate(items):
            if kind_of(item) == "item_reference":
                item_id = str(item.get("id"))
                found = await asyncio.to_thread(self._store.item, item_id)
                if found is None:
                    why = f"there is no item {item_id!r}, or no more; send the item itself"
                    raise invalid(f"input[{i}]", why)
                item = found
            made.append(item)
        return made


def responses_routes(responses: Responses) -> APIRouter:
    """The routes of responses."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, whole, as a stream, or in the background."""
        return await responses.create(body, request)

    @router.post("/v1/responses/input_tokens")
    async def count_tokens(body: ResponsesRequest) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        return await responses.count_tokens(body)

    @router.get("/v1/responses/{response_id}")
    async def show(response_id: str, stream: bool = False) -> dict[str, Any]:
        """A response that is kept, or as far as it is made in the background."""
        if stream:
            why = "a response that is kept comes whole"
            raise ApiError(400, f"stream: {why}", code="unsupported_parameter", param="stream")
        return await responses.get(response_id)

    @router.delete("/v1/responses/{response_id}")
    async def forget(response_id: str) -> dict[str, Any]:
        """Forget a response; those that go on from it can no more be gone on with."""
        return await responses.delete(response_id)

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> dict[str, Any]:
        """End a response that is being made."""
        return await responses.cancel(response_id)

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_items(response_id: str, query: Annotated[ItemsQuery, Query()]) -> dict[str, Any]:
        """What a response was asked."""
        return await responses.input_items(response_id, query)

    return router


def _page(items: Sequence[Item], query: ItemsQuery) -> dict[str, Any]:
    ordered = list(items) if query.order == "asc" else list(reversed(items))
    ids = [item["id"] for item in ordered]
    start = ids.index(query.after) + 1 if query.after in ids else 0
    end = ids.index(query.before) if query.before in ids else len(ids)
    page = ordered[start:end][: query.limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < end,
    }


def _unknown(response_id: str) -> ApiError:
    return ApiError(404, f"there is no response {response_id!r}, or no more", code="not_found")
