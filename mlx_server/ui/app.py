"""The page as an application: NiceGUI below `/ui`, with headers that bound what it may do."""

from pathlib import Path

from fastapi import FastAPI
from nicegui import app as nicegui_app
from nicegui import core, ui
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_server.ui.api import Api
from mlx_server.ui.markdown import highlighting
from mlx_server.ui.shell import VIEWS, Shell

MOUNT = "/ui"
FOLDER = Path(__file__).parent
RECONNECT_SECONDS = 10.0
"""A page that is gone for longer begins anew; its generations end."""
MESSAGE_BYTES = 16 * 1024 * 1024
"""A conversation comes from the browser in one message."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        # Vue compiles templates in the browser, and NiceGUI writes its start into the page.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        # Nothing that a model writes can call anybody: no images, frames or forms elsewhere.
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "frame-src 'none'",
        "object-src 'none'",
        "form-action 'none'",
    )
)


class PageHeaders:
    """Adds the content security policy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def build(server: str) -> FastAPI:
    """`server` is the URL of the API."""
    application = FastAPI(openapi_url=None, middleware=[Middleware(PageHeaders)])
    api = Api(server)
    script = (FOLDER / "page.js").read_text()
    style = (FOLDER / "page.css").read_text() + highlighting()
    head = f"<style>{style}</style><script>{script}</script>"

    async def show(view: str = "") -> None:
        ui.add_head_html(head)
        await Shell(api, view if view in VIEWS else "chat").show()

    ui.page("/")(show)
    ui.page("/{view}")(show)
    core.sio.eio.max_http_buffer_size = MESSAGE_BYTES
    nicegui_app.on_shutdown(api.close)
    ui.run_with(
        application,
        mount_path=MOUNT,
        title="mlx-server",
        favicon=FOLDER / "icon.svg",
        dark=None,
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=RECONNECT_SECONDS,
        show_welcome_message=False,
    )
    return application
