"""``foveate ui``: the web chat for a server that runs, here or elsewhere."""

from __future__ import annotations

import webbrowser
from typing import Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter

from foveate.config import HttpSettings
from foveate.deploy.listen import listen, url_of
from foveate.deploy.webchat import require_gradio
from foveate.errors import ConfigError
from foveate.hosts import is_loopback
from foveate.ui.app import Access, create_app, serve, uploads_folder

DEFAULT_URL = "http://127.0.0.1:9997"


def command(
    url: str = DEFAULT_URL,
    /,
    *,
    host: Annotated[str, Parameter(env_var="FOVEATE_UI_HOST")] = "127.0.0.1",
    port: Annotated[int, Parameter(env_var="FOVEATE_UI_PORT")] = 7860,
    api_key: Annotated[str | None, Parameter(env_var=["FOVEATE_API_KEY", "OPENAI_API_KEY"])] = None,
    password: Annotated[str | None, Parameter(env_var="FOVEATE_UI_PASSWORD")] = None,
    open_: Annotated[bool, Parameter(name="--open", negative=())] = False,
) -> int:
    """Open a web chat for an OpenAI-compatible server.

    Args:
        url: the server's address, with or without /v1.
        host: address to listen on. Anything but a loopback address needs --password.
        port: port to listen on; 0 takes a free one and prints it.
        api_key: the server's key, for everybody who opens the page. Without one, visitors may enter theirs.
        password: what visitors must enter, with any name.
        open_: open the page in a browser.
    """
    require_gradio()
    _check(url, host, password)
    # What follows the first comma is another key that the server takes.
    key = api_key.split(",")[0].strip() if api_key else None
    http = HttpSettings(host=host, port=port, api_key=[password] if password else [])
    with listen(http) as listener, uploads_folder() as uploads:
        here = url_of(listener)
        print(f"Loading the web chat for {url} ...", flush=True)
        access = Access(password=password, check_host=password is None)
        app = create_app(url, uploads, access, key=key, certificate=None)

        def announce() -> None:
            print(f"The web chat is ready: {here} (Ctrl-C ends it)", flush=True)
            if open_:
                webbrowser.open(here)

        serve(app, listener, announce)
    return 0


def _check(url: str, host: str, password: str | None) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"URL: got {url!r}, expected a server's address, such as {DEFAULT_URL}")
    if not password and not is_loopback(host):
        raise ConfigError(
            f"--host: other machines can reach {host}, so visitors must show a password: "
            "set one with --password or FOVEATE_UI_PASSWORD"
        )
