"""`/ui`: whatever is asked below it is passed to the page's process."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import RedirectResponse, Response, StreamingResponse

from mlx_server.api.http.connection import TAKE_OVER
from mlx_server.api.page.process import PageProcess
from mlx_server.api.page.tunnel import target, tunnel
from mlx_server.errors import Forbidden, NotFound, Unavailable

if TYPE_CHECKING:
    import httpx2

PATH = "/ui"
NOT_PASSED = frozenset(
    # Of this connection alone, or not for the page to decide.
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "x-forwarded-prefix"}
)
NOT_ANSWERED = NOT_PASSED | {
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "date",
    "server",
}
ABSENT = (
    "The web page is not installed here: pip install 'mlx-server[ui]', then start the server again."
)
GONE = "The web page's process is gone; ask again."

router = APIRouter(include_in_schema=False)
absent = APIRouter(include_in_schema=False)
"""In its place where it is not installed."""


@router.get(PATH)
async def bare(request: Request) -> Response:
    root = str(request.scope.get("root_path", "")).rstrip("/")
    return RedirectResponse(f"{root}{PATH}/", status_code=308)


@router.api_route(PATH + "/{path:path}", methods=["GET", "POST"])
async def page(request: Request) -> Response:
    """Asks for no key: the page has nothing of its own, and asks the API with its user's key."""
    _require_own_origin(request)
    process: PageProcess = request.app.state.page
    path = await process.socket(_address(request))
    if TAKE_OVER in request.scope["state"]:
        try:
            await tunnel(request, path)
        except OSError as error:
            raise Unavailable(GONE, retry_after=1) from error
        # Nobody reads it.
        return Response(status_code=101)
    return await _passed(request, process.client(path))


@absent.get(PATH + "{rest:path}")
async def no_page() -> Response:
    raise NotFound(ABSENT)


def _require_own_origin(request: Request) -> None:
    """Of reading requests too: a WebSocket begins as one, and no browser asks before it."""
    host = request.headers.get("host", "").lower()
    own = {f"http://{host}", f"https://{host}"}
    if not {origin.lower() for origin in request.headers.getlist("origin")} <= own:
        raise Forbidden("A page of another origin may not do this.", code="invalid_origin")


def _address(request: Request) -> str:
    """Where this server listens, as it is reached from this machine."""
    host, port = request.scope["server"]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _passed(request: Request, client: "httpx2.AsyncClient") -> Response:
    import httpx2

    # Not the client's own headers: it would ask for what the browser did not.
    asked = httpx2.Request(
        request.method,
        httpx2.URL("http://page").copy_with(raw_path=target(request)),
        headers=[pair for pair in request.headers.items() if pair[0] not in NOT_PASSED],
        content=await request.body(),
    )
    try:
        answer = await client.send(asked, stream=True)
    except httpx2.TransportError as error:
        raise Unavailable(GONE, retry_after=1) from error
    passed = StreamingResponse(
        answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose)
    )
    passed.raw_headers = [
        (name.lower(), value)
        for name, value in answer.headers.raw
        if name.decode("latin-1").lower() not in NOT_ANSWERED
    ]
    return passed
