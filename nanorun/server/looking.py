"""What whoever runs the endpoint can look at: figures, who is answered now, what is served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from nanorun import __version__
from nanorun.errors import NanorunError
from nanorun.model.chat import ModelInfo
from nanorun.model.gguf import read_gguf
from nanorun.server.errors import ApiError
from nanorun.server.metrics import Metrics
from nanorun.server.record import AnswerRecord, RequestRecord
from nanorun.server.service import Service


def looking_routes(service: Service, metrics: Metrics) -> APIRouter:
    """/metrics, and /slots and /props in llama.cpp's words."""
    router = APIRouter()
    templates: dict[str, str] = {}

    @router.get("/metrics", response_model=None)
    async def show_metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        text, media_type = metrics.exposed(request.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    @router.get("/slots")
    async def show_slots(
        fail_on_no_slot: Annotated[str | None, Query()] = None,
    ) -> list[dict[str, Any]]:
        """Who is answered now, who waits, and which places are free."""
        info, n_places = service.info(), service.settings.n_parallel
        slots = _slots(list(service.under_way.values()), info.n_ctx, n_places)
        if fail_on_no_slot is not None and all(slot["is_processing"] for slot in slots[:n_places]):
            raise ApiError(503, "no slot is free", type="unavailable_error", code="no_slot")
        return slots

    @router.get("/props")
    async def show_props() -> dict[str, Any]:
        """What is served, and how."""
        info = service.info()
        if info.path not in templates:
            templates[info.path] = await asyncio.to_thread(_chat_template, Path(info.path))
        return _props(service, info, templates[info.path])

    return router


def _slots(records: list[RequestRecord], n_ctx: int, n_places: int) -> list[dict[str, Any]]:
    """Places that are taken, then free ones, then the answers that wait for one."""
    answers = [(record, answer) for record in records for answer in record.answers]
    running = [_taken(*pair) for pair in answers if pair[1].phase not in ("waiting", "done")]
    waiting = [_taken(*pair) for pair in answers if pair[1].phase == "waiting"]
    free = [{"is_processing": False}] * (n_places - len(running))
    shown = [*running, *free, *waiting]
    return [{"id": i, "n_ctx": n_ctx, **slot} for i, slot in enumerate(shown)]


def _taken(record: RequestRecord, answer: AnswerRecord) -> dict[str, Any]:
    is_processing = answer.phase != "waiting"
    return {
        "is_processing": is_processing,
        "id_task": record.number,
        "request_id": record.id,
        "reply_id": record.reply_id,
        "route": record.path,
        "key": record.key,
        "model": record.model,
        "phase": answer.phase,
        "age_s": round(record.age_s, 3),
        "n_prompt_tokens": answer.n_prompt,
        "n_prompt_tokens_processed": answer.n_read - answer.n_reused,
        "n_prompt_tokens_cache": answer.n_reused,
        "next_token": [{"has_next_token": is_processing, "n_decoded": answer.n_generated}],
    }


def _props(service: Service, info: ModelInfo, chat_template: str) -> dict[str, Any]:
    return {
        "default_generation_settings": {"n_ctx": info.n_ctx},
        "total_slots": service.settings.n_parallel,
        "model_alias": service.names.name,
        # The folders above it are nobody's business.
        "model_path": Path(info.path).name,
        "chat_template": chat_template,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"nanorun {__version__}",
    }


def _chat_template(path: Path) -> str:
    """The template of a model's file; empty if it has none, or is gone."""
    try:
        metadata = read_gguf(path, check_data=False).metadata
    except (NanorunError, OSError):
        return ""
    return str(metadata.get("tokenizer.chat_template") or "")
