"""A service that is ready: model and adapters loaded, and proven by their golden answers."""

from __future__ import annotations

from raytune_ft.core.errors import RaytuneError
from raytune_ft.serving.board import Bulletin
from raytune_ft.serving.catalogue import check_adapter
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.parity import check_parity, golden_folder
from raytune_ft.serving.service import Service


def start_service(config: ServingConfig, reference: str, device: str, *, replica: str, board: Bulletin) -> Service:
    """The service of one replica.

    Args:
        config: settings of the endpoint.
        reference: the model, as this machine finds it.
        device: ``cpu`` or ``cuda``.
        replica: its name in metrics and file names.
        board: what it agrees with the other replicas by.

    Raises:
        ModelError: if the model or an adapter cannot be loaded, or does not answer as it was trained.
    """
    engine = TransformersEngine.load(
        reference,
        precision=config.precision,
        device=device,
        adapters=config.adapters,
        num_threads=config.num_cpus,
        max_batch_size=config.max_batch_size,
        max_adapters=config.max_adapters,
        max_lora_rank=config.max_lora_rank,
        prefill_tokens=config.prefill_tokens,
    )
    try:
        folder = golden_folder(engine.loaded.reference)
        if folder is not None:
            check_parity(engine, folder, config.golden_tolerance)
        for name, where in config.adapters.items():
            check_adapter(engine, name, where, config.golden_tolerance)
        return Service(config, engine, replica=replica, board=board)
    except RaytuneError:
        engine.close()
        raise
