"""A request on its way in, a response on its way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .repos import HubError


@dataclass
class Call:
    """One request. `args` are the parts of its path that the route names, unquoted."""

    method: str
    path: str  # still quoted
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: str | None
    endpoint: str  # the Hub's own address, for the links in its answers
    args: dict[str, str] = field(default_factory=dict)

    @property
    def repo_key(self) -> str:
        """The repo's key in `Storage.repos`: "owner/name", "datasets/owner/name"."""
        kind = self.args.get("kind") or "models"
        return self.args["name"] if kind == "models" else f"{kind}/{self.args['name']}"

    def json(self) -> dict[str, Any]:
        """The body as JSON; an empty one as {}."""
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        """Whether the query has this name with the value 1 or true."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """What goes back; `cut` closes the connection after that many bytes of the body."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def json_response(data: Any, status: int = 200) -> Response:
    """A response whose body is `data` as JSON."""
    return Response(json.dumps(data).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


def error_response(error: HubError) -> Response:
    """The response that makes the client raise what the Hub's would: status, error code and message."""
    response = json_response({"error": str(error)}, error.status)
    # Header values are latin-1 on the wire, and the client puts this one into its exceptions.
    response.headers["X-Error-Message"] = str(error).encode("ascii", "replace").decode().replace("\n", " ")
    if error.code:
        response.headers["X-Error-Code"] = error.code
    response.headers.update(error.headers)
    return response
