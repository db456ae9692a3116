"""A look at a user's DeepSpeed JSON by DeepSpeed's own parser, before any worker starts."""

from __future__ import annotations

from pydantic import ValidationError

from raytune_ft.core.errors import ConfigError, last_line
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.deepspeed_settings import deepspeed_settings


def refuse_unparsable(config: FineTuningConfig) -> None:
    """Checks that DeepSpeed understands the user's JSON; loads DeepSpeed only where one is given.

    Raises:
        ConfigError: with what DeepSpeed says of it.
    """
    if not config.deepspeed_config:
        return
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(deepspeed_settings(config, "fp32"))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"deepspeed_config: DeepSpeed refuses it ({error.title}: {faults})") from None
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, DeepSpeedConfigError) as error:
        raise ConfigError(f"deepspeed_config: DeepSpeed refuses it ({last_line(error)})") from None
