"""The API's description, as JSON and as pages. It asks for a key where the API does."""

from fastapi import APIRouter, Depends
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse

from mlx_server.api.http.dependencies import authenticated

PATH = "/openapi.json"

router = APIRouter(dependencies=[Depends(authenticated)], include_in_schema=False)


@router.get(PATH)
async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def swagger(request: Request) -> HTMLResponse:
    return get_swagger_ui_html(openapi_url=_address(request), title=request.app.title)


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    return get_redoc_html(openapi_url=_address(request), title=request.app.title)


def _address(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/") + PATH
