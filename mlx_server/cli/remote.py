"""A running server, as commands ask it."""

import difflib
import json
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_server.cli.options import CommandError, load_settings
from mlx_server.errors import ModelLoading, Unavailable, reason

if TYPE_CHECKING:
    import httpx2

    from mlx_server.config import Settings

TIMEOUT = 10.0
SILENCE = 600.0
"""Of a stream: a model may have to load first."""
RETRY_SECONDS = 1.0
NOBODY = "Connection refused"
"""The system's words for a port where nobody listens."""
SHOWN = 8
"""Models that an error names."""
START_ONE = "start one with `mlx-server serve`, or say --host and --port"
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def url_of(host: str, port: int) -> str:
    host = WILDCARDS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def event_of(line: str) -> dict[str, Any] | None:
    """What a line of a stream says, unless it is none of data or the last. Raises ValueError."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    return event


class Refused(Unavailable):
    """`code` is what the server gave, if it gave one."""


@dataclass(frozen=True)
class Remote:
    """`url` has no path; `advice` is what to do where nothing listens. Every method raises
    Unavailable for no server, a refusal or a stranger.
    """

    url: str
    key: str | None
    advice: str = START_ONE

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str) -> Any:
        import httpx2

        with _reported(self.url, self.advice):
            with httpx2.Client(timeout=TIMEOUT, trust_env=False) as client:
                answer = client.get(f"{self.url}{path}", headers=self.headers)
            return self._body(answer)

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The data of each server-sent event; close the iterator to end the request. While the
        model still loads, the server is asked again.
        """
        while True:
            try:
                yield from self._streamed(path, body)
                return
            except Refused as error:
                if error.code != ModelLoading.code:
                    raise
                time.sleep(RETRY_SECONDS)

    def _streamed(
        self, path: str, body: Mapping[str, Any]
    ) -> Generator[dict[str, Any], None, None]:
        import httpx2

        timeout = httpx2.Timeout(SILENCE, connect=TIMEOUT)
        with (
            _reported(self.url, self.advice),
            httpx2.Client(timeout=timeout, trust_env=False) as client,
            client.stream(
                "POST", f"{self.url}{path}", json=dict(body), headers=self.headers
            ) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                self._body(answer)
            for line in answer.iter_lines():
                if (event := event_of(line)) is not None:
                    if error := event.get("error"):
                        raise Unavailable(error["message"])
                    yield event

    def admin_models(self) -> list[dict[str, Any]]:
        with _reported(self.url, self.advice):
            models: list[dict[str, Any]] = self.get("/admin/models")["models"]
            return models

    def chat_models(self) -> list[dict[str, Any]]:
        with _reported(self.url, self.advice):
            return [model for model in self.get("/v1/models")["data"] if _chats(model)]

    def _body(self, answer: "httpx2.Response") -> Any:
        body = answer.json()
        if answer.status_code != 200:
            message = body["error"]["message"]
            if answer.status_code == 401:
                message += " Give --api-key KEY, or put it into the setting `api_keys`."
            raise Refused(
                f"the server at {self.url} refused: {message}", code=body["error"].get("code")
            )
        return body


@contextmanager
def _reported(url: str, advice: str) -> Iterator[None]:
    """Turns what goes wrong between here and a server into Unavailable."""
    import httpx2

    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        said = reason(error)
        why = "" if NOBODY in said else f" ({said})"
        raise Unavailable(f"no server answers at {url}{why}: {advice}") from error
    except httpx2.TransportError as error:
        said = reason(error) if str(error) else "silence"
        raise Unavailable(f"the server at {url} broke off: {said}") from error
    except httpx2.InvalidURL as error:
        raise Unavailable(f"{url} is no address ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"what answers at {url} is no mlx-server") from error


def choose_model(remote: Remote, name: str | None) -> str:
    """The one of that name, or the only one that chats, or the only one loaded. Raises CommandError
    that names the nearest or all.
    """
    models = remote.chat_models()
    ids = [model["id"] for model in models]
    if name is not None:
        names = [*ids, *(alias for model in models for alias in model.get("aliases") or ())]
        if name in names or not ids:
            return name
        close = difflib.get_close_matches(name, names, cutoff=0.4)
        hint = f" Close: {', '.join(close)}." if close else f" It has {', '.join(ids[:SHOWN])}."
        raise CommandError(f"{remote.url} has no chat model {name!r}.{hint}")
    loaded = [model["id"] for model in models if model.get("state") == "ready"]
    if len(ids) == 1 or len(loaded) == 1:
        return str((ids if len(ids) == 1 else loaded)[0])
    if not ids:
        raise CommandError(f"{remote.url} has no chat model: `mlx-server pull` fetches one")
    raise CommandError(f"which model? Say --model with one of {', '.join(ids[:SHOWN])}")


def _chats(model: dict[str, Any]) -> bool:
    """Other servers tell no capabilities."""
    capabilities = model.get("capabilities")
    return not isinstance(capabilities, dict) or bool(capabilities.get("chat", True))


def find_remote(
    host: str | None, port: int | None, api_key: str | None, config: Path | None
) -> Remote:
    """The server that flags and settings describe."""
    settings = load_settings(config, host=host, port=port)
    return Remote(url_of(settings.host, settings.port), api_key or _first_key(settings))


def named_remote(url: str, api_key: str | None) -> Remote:
    """Any server that speaks OpenAI's API, with or without `/v1` at its end."""
    if "://" not in url:
        raise CommandError(f"--url {url!r} is no address such as http://127.0.0.1:8000")
    advice = "start it, or mend --url"
    return Remote(url.rstrip("/").removesuffix("/v1"), api_key, advice)


def _first_key(settings: "Settings") -> str | None:
    keys = (key.get_secret_value() for key in (*settings.admin_keys, *settings.api_keys))
    return next(keys, None)
