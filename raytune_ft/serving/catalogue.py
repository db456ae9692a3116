"""The models of an endpoint: the base, its adapters, and what every replica should have loaded."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from raytune_ft.core.errors import ModelError, RaytuneError
from raytune_ft.core.storage import Location
from raytune_ft.models.references import resolve_model
from raytune_ft.serving.adapters import NoSlotError
from raytune_ft.serving.answers import model_card
from raytune_ft.serving.board import Bulletin, Posted, Posting
from raytune_ft.serving.config import ADAPTER_NAME, ServingConfig
from raytune_ft.serving.config_ab import BASE
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.faults import ApiError
from raytune_ft.serving.metrics import Metrics, Series, exposition
from raytune_ft.serving.parity import check_parity, golden_folder
from raytune_ft.serving.rates import Rates

logger = logging.getLogger("raytune_ft")


class Catalogue:
    """What a replica serves, kept in step with the others through the board."""

    def __init__(
        self, config: ServingConfig, engine: TransformersEngine, metrics: Metrics, board: Bulletin, rates: Rates
    ) -> None:
        self._config, self._engine, self._metrics, self._board = config, engine, metrics, board
        self._rates = rates
        self._loaded = {name: Posting(reference) for name, reference in config.adapters.items()}
        self._known: dict[str, Posting] = {}
        """What was last said of each name, as far as this replica has heard."""
        self._variants = config.ab_test.variants if config.ab_test else {}
        self._whole = {config.served_name}
        """Ids of the model without an adapter."""
        if config.tested_name:
            self._whole |= {f"{config.served_name}:{BASE}", config.tested_name}
        self._epoch: str | None = None
        self._others: list[Series] = []
        self._changing = asyncio.Lock()
        self._failed: dict[str, Posting] = {}

    def cards(self, created: int) -> list[dict[str, Any]]:
        """The base, an A/B test upon it, and its adapters, as ``GET /v1/models`` lists them."""
        base = self._config.served_name
        names = sorted(self._whole - {base}) + [f"{base}:{name}" for name in self._engine.adapters.names]
        return [model_card(base, created), *(model_card(name, created, parent=base) for name in names)]

    async def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's model names; None for the base.

        Raises:
            ApiError: 404, naming what is served.
        """
        base = self._config.served_name
        if model in self._whole:
            return None
        adapter = model.removeprefix(f"{base}:")
        if adapter != model and re.fullmatch(ADAPTER_NAME, adapter):
            if adapter not in self._engine.adapters.names:
                await self.keep_in_step()  # another replica may have loaded it a moment ago
            if adapter in self._engine.adapters.names:
                return adapter
        served = ", ".join(repr(card["id"]) for card in self.cards(0))
        message = f"the model {model[:200]!r} is not served here; there is {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def keep_in_step(self) -> None:
        """Tells the board this replica's figures, and loads and drops what the board says."""
        # Under the lock, so that what the board says is not older than what this replica does meanwhile.
        async with self._changing:
            posted: Posted = await self._board.report(
                self._metrics.replica, self._epoch, self._known, self._metrics.series()
            )
            self._epoch, self._known, self._others = posted.epoch, posted.postings, posted.others
            self._rates.replicas = max(self._config.num_replicas, 1 + len(posted.others))
            # Also what was dropped and loaded again meanwhile: other weights may lie there now.
            for name in [name for name, loaded in self._loaded.items() if posted.postings.get(name) != loaded]:
                await self._drop(name)
            for name in posted.adapters:
                said = posted.postings[name]
                if name not in self._loaded and self._failed.get(name) != said:
                    try:
                        await self._load(name, said)
                    except NoSlotError:
                        logger.info("adapter %r waits until an adapter that is dropped is given back", name)
                    except RaytuneError as error:
                        self._failed[name] = said
                        logger.warning("adapter %r, which another replica has, cannot be loaded: %s", name, error)

    def loadable(self) -> list[str]:
        """Names in `adapters_path` that can be loaded, sorted."""
        if self._config.adapters_path is None:
            return []
        return [name for name in Location.at(self._config.adapters_path).folders() if re.fullmatch(ADAPTER_NAME, name)]

    async def load(self, name: str) -> None:
        """Loads an adapter by its name here, and tells the other replicas.

        Raises:
            ApiError: 404 if there is none of this name, 409 if it is loaded, 400 if it does not fit.
        """
        if name not in await asyncio.to_thread(self.loadable):
            where = "adapters_path is not set" if self._config.adapters_path is None else "adapters_path has none"
            raise ApiError(404, f"there is no adapter of this name to load ({where})", param="name")
        assert self._config.adapters_path is not None
        reference = (Location.at(self._config.adapters_path) / name).uri
        async with self._changing:
            if name in self._loaded:
                raise ApiError(409, f"the adapter {name!r} is loaded already", param="name")
            try:
                await self._load(name, Posting(reference))
            except RaytuneError as error:
                raise ApiError(400, str(error), param="name") from None
            self._failed.pop(name, None)
            self._loaded[name] = self._known[name] = await self._board.post(name, reference)

    async def drop(self, name: str) -> None:
        """Drops an adapter here at once, and from the other replicas when they next look.

        Raises:
            ApiError: 404 if it is not loaded, 409 if an A/B test has it.
        """
        async with self._changing:
            if name not in self._loaded:
                raise ApiError(404, "there is no adapter of this name", param="name")
            if name in self._variants:
                raise ApiError(409, f"the adapter {name!r} is a variant of the A/B test that runs", param="name")
            self._known[name] = await self._board.take_down(name)
            await self._drop(name)

    def exposition(self) -> bytes:
        """Prometheus' text of all replicas, the others as they last told."""
        running, waiting = self._engine.load_now
        replica = self._metrics.replica
        self._metrics.running.labels(replica).set(running)
        self._metrics.queued.labels(replica).set(waiting)
        self._metrics.ready.labels(replica).set(int(self._engine.alive))
        self._metrics.adapters.labels(replica).set(len(self._engine.adapters.names))
        return exposition([self._metrics.series(), *self._others])

    async def _load(self, name: str, said: Posting) -> None:
        assert said.reference is not None
        await asyncio.to_thread(self._load_and_check, name, said.reference)
        self._loaded[name] = said

    def _load_and_check(self, name: str, reference: str) -> None:
        self._engine.add_adapter(name, reference)
        try:
            check_adapter(self._engine, name, reference, self._config.golden_tolerance)
        except ModelError:
            self._engine.drop_adapter(name)
            raise

    async def _drop(self, name: str) -> None:
        await asyncio.to_thread(self._engine.drop_adapter, name)
        self._loaded.pop(name, None)


def check_adapter(engine: TransformersEngine, name: str, reference: str, tolerance: float) -> None:
    """Replays an adapter's golden answers.

    Raises:
        ModelError: as `check_parity`.
    """
    folder = golden_folder(resolve_model(reference))
    if folder is not None:
        check_parity(engine, folder, tolerance, adapter=name)
