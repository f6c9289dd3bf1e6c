"""A model behind an OpenAI-style endpoint, with the same verbs and events as the local engine.

Any will do: vLLM, NIM, llama.cpp's server, another nanorun. What differs between them is in
`dialect.py` (what they take) and `reply.py` (what they say).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from nanorun.errors import EngineError, UsageError
from nanorun.model.chat import GenerateOptions, ModelInfo, Prompt, RawPrompt
from nanorun.runtime.remote.dialect import dialect_of
from nanorun.runtime.remote.generation import RemoteGeneration
from nanorun.runtime.remote.http import (
    Endpoint,
    RemoteSettings,
    key_from_environment,
    parse_address,
)
from nanorun.runtime.remote.learned import Learned


class RemoteClient:
    """A client of one model at an endpoint.

    Args:
        endpoint: Its address, with or without `/v1`.
        model: The model's name there; None for the only one.
        settings: How patient to be.

    Raises:
        UsageError: If the address or the key of the environment cannot be used.
    """

    def __init__(
        self, endpoint: str, model: str | None = None, settings: RemoteSettings | None = None
    ) -> None:
        self.address = parse_address(endpoint)
        self._learned = Learned()
        self._asked_model = model
        self._http = Endpoint(self.address, key_from_environment(), settings or RemoteSettings())
        self._info: ModelInfo | None = None
        self._starting = asyncio.Lock()

    @property
    def info(self) -> ModelInfo | None:
        """What the endpoint says of its model; None before `start`."""
        return self._info

    async def start(self) -> ModelInfo:
        """Reach the endpoint and choose the model.

        Raises:
            EngineDied: If it cannot be reached.
            EngineError: If it refuses the key, or is no such endpoint.
            UsageError: If it does not have the model, or has several and none was named.
        """
        async with self._starting:
            if self._info is None:
                began = time.monotonic()
                model = await self._choose_model()
                self._learned.dialect = dialect_of(model, self.address.host)
                self._info = self._model_info(model, time.monotonic() - began)
            return self._info

    async def close(self) -> None:
        """Close the connections; replies still running end with `EngineDied`."""
        await self._http.close()

    def generate(self, prompt: Prompt, options: GenerateOptions) -> RemoteGeneration:
        """Begin a reply; the endpoint is asked when its first event is."""
        asked = prompt if isinstance(prompt, RawPrompt) else tuple(prompt)
        return RemoteGeneration(self.start, self._http, self._learned, asked, options)

    async def _choose_model(self) -> Mapping[str, Any]:
        url = f"{self.address.base}/models"
        listing = await self._http.ask("GET", "models")
        data = listing.get("data") if isinstance(listing, Mapping) else None
        if not isinstance(data, list):
            raise EngineError(f"{url} does not list models as an OpenAI-style endpoint does")
        models = {str(m["id"]): m for m in data if isinstance(m, Mapping) and "id" in m}
        if self._asked_model is None and len(models) == 1:
            return next(iter(models.values()))
        if self._asked_model in models:
            return models[self._asked_model]
        names = ", ".join(list(models)[:12]) + (", ..." if len(models) > 12 else "")
        facts = [f"models: {names}" if names else "it lists none"]
        first = next(iter(models), "MODEL")
        tries = [f"nanorun run --endpoint {self.address.base} {first} 'What is 17 + 25?'"]
        if self._asked_model is None:
            raise UsageError(
                f"{url} lists {len(models)} models; name one", facts=facts, tries=tries
            )
        raise UsageError(f"{url} has no model {self._asked_model!r}", facts=facts, tries=tries)

    def _model_info(self, model: Mapping[str, Any], seconds: float) -> ModelInfo:
        """What there is to know from here; counts that the endpoint does not tell are 0."""
        meta = model.get("meta")
        meta = meta if isinstance(meta, Mapping) else {}

        def count(*names: str) -> int:
            values = (fields.get(name) for name in names for fields in (model, meta))
            return next((v for v in values if isinstance(v, int) and v > 0), 0)

        recipe = meta.get("recipe", meta.get("ftype"))
        return ModelInfo(
            name=str(model["id"]),
            path=self.address.base,
            arch="",
            n_params=count("n_params"),
            file_bytes=count("size"),
            n_vocab=count("n_vocab"),
            n_layer=0,
            n_ctx=count("max_model_len", "n_ctx", "context_length"),
            n_ctx_train=count("n_ctx_train"),
            n_seq_max=1,
            recipe=recipe if isinstance(recipe, str) else None,
            load_s=seconds,
            device=self.address.shown,
        )
