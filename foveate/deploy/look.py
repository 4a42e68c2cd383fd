"""``foveate vision``: a vision service by itself, for servers on this machine or others."""

from __future__ import annotations

from foveate.config import Settings
from foveate.deploy.flags import Flag, settings_command
from foveate.deploy.instance import instance_directory
from foveate.deploy.keys import with_secrets
from foveate.deploy.resolve import resolve_model
from foveate.errors import ConfigError
from foveate.telemetry import configure_logging

READY = "The vision service is ready at "
_SECTIONS = frozenset({"model", "vision", "transport", "logs"})
_OF_OTHERS = frozenset({"encoder", "vision", "vision_wait_seconds", "transport", "served_model_name"})
_MEDIA = frozenset({"max_image_pixels", "max_image_bytes"})


def look(settings: Settings) -> int:
    """Start a vision service alone and keep it running until Ctrl-C.

    Raises:
        ConfigError: a setting is impossible on this machine, or ``--listen`` is missing.
        CheckpointError: the model is not there, or is not one that can be served.
    """
    listen = settings.vision.listen
    if listen is None:
        raise ConfigError("--listen: say where: unix:PATH, or HOST:PORT with --vision-token or TLS")
    settings = with_secrets(settings)
    configure_logging(settings.logs, "vision")
    model = resolve_model(settings.model)
    settings = settings.model_copy(update={"model": model.settings})
    print(f"Loading the vision encoder of {model.name} from {model.folder} ...", flush=True)
    # Imported here because it brings in torch, which checking the settings does not need.
    from foveate.vision.process import serve

    # What it leaves behind when it is killed is found by its lock.
    with instance_directory(settings) as directory:
        serve(
            settings,
            listen=listen,
            arena_address=str(directory / "arena.sock"),
            ready=lambda address: print(f"{READY}{address} ({model.name})", flush=True),
        )
    return 0


def _takes(flag: Flag) -> bool:
    return (flag.section in _SECTIONS and flag.field not in _OF_OTHERS) or flag.field in _MEDIA


command = settings_command(look, takes=_takes)
