"""What people look at: the web page at /, and the documentation at /docs. Nothing comes from other hosts."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_UI = Path(__file__).parent / "ui"
# Swagger UI's own files, which FastAPI would have browsers fetch from a content delivery network.
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
_DOCS = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>FaithDiff: interface</title>
<link rel="stylesheet" href="docs/files/swagger-ui.css">
<link rel="icon" href="docs/files/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/files/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#swagger-ui', deepLinking: true, docExpansion: 'list'});\n"


class _PageFiles(StaticFiles):
    """Files that browsers ask after every time: a page must never run with parts of the version before it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_page(api: FastAPI) -> None:
    """The web page, whose files are read as they are."""

    async def page() -> Response:
        return FileResponse(_UI / "index.html", headers={"Cache-Control": "no-cache"})

    api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(page)
    api.mount("/ui", _PageFiles(directory=_UI))


def add_docs(api: FastAPI) -> None:
    """The documentation, to read and to try out."""

    async def docs() -> Response:
        return HTMLResponse(_DOCS)

    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    api.get("/docs", include_in_schema=False)(docs)
    api.get("/docs/start.js", include_in_schema=False)(start)
    api.mount("/docs/files", StaticFiles(directory=_SWAGGER))
