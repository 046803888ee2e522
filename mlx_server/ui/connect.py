"""How to use this server from elsewhere, ready to copy."""

from collections.abc import Callable
from urllib.parse import urlsplit

from nicegui import ui

from mlx_server.ui.api import Api
from mlx_server.ui.browser import Browser
from mlx_server.ui.markdown import code_block

KEY = "YOUR_KEY"
UNUSED = "unused"
"""What clients need where the server asks for no key."""
CURL = """\
curl {base}/v1/chat/completions \\
  -H 'Authorization: Bearer {key}' \\
  -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
PYTHON = """\
from openai import OpenAI

client = OpenAI(base_url="{base}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Hello"}}],
)
print(answer.choices[0].message.content)"""
NODE = """\
import OpenAI from "openai";

const client = new OpenAI({{ baseURL: "{base}/v1", apiKey: "{key}" }});
const answer = await client.chat.completions.create({{
  model: "{model}",
  messages: [{{ role: "user", content: "Hello" }}],
}});
console.log(answer.choices[0].message.content);"""
ENVIRONMENT = """\
export OPENAI_BASE_URL={base}/v1
export OPENAI_API_KEY={key}"""
ANTHROPIC = """\
export ANTHROPIC_BASE_URL={base}
export ANTHROPIC_AUTH_TOKEN={key}"""
LAUNCH = """\
mlx-server launch claude --port {port} --model {model}
mlx-server launch codex --port {port} --model {model}
# opencode, aider, qwen, llm and open-webui likewise; --print shows what it sets"""
COMMANDS = """\
mlx-server ps --port {port}
mlx-server list        # what it can serve
mlx-server pull MODEL  # fetch another model"""
SNIPPETS = (
    ("Agents, on the server's machine", "bash", LAUNCH),
    ("Any OpenAI client", "bash", ENVIRONMENT),
    ("Any Anthropic client", "bash", ANTHROPIC),
    ("Python: pip install openai", "python", PYTHON),
    ("JavaScript: npm install openai", "javascript", NODE),
    ("curl", "bash", CURL),
    ("On the server's machine", "bash", COMMANDS),
)


class ConnectView:
    title, icon = "Connect", "cable"
    seconds = 60.0

    def __init__(self, api: Callable[[], Api], browser: Browser) -> None:
        self._api = api
        self._browser = browser
        self._drawn: tuple[str, str] | None = None

    async def build(self) -> None:
        self._base = await self._browser.origin()
        self._box = ui.element("div").classes("page narrow")
        await self.refresh()

    async def refresh(self) -> None:
        models = await self._api().models()
        ready = [one["id"] for one in models if one["state"] == "ready"]
        model = next(iter(ready or [one["id"] for one in models]), "MODEL")
        # A key itself is shown nowhere.
        key = KEY if self._api().key else UNUSED
        if self._drawn == (model, key):
            return
        self._drawn = (model, key)
        port = urlsplit(self._api().server).port
        self._box.clear()
        with self._box:
            ui.label(f"This server answers at {self._base}.").classes("title")
            for heading, language, text in SNIPPETS:
                ui.label(heading).classes("heading").props('role="heading" aria-level="2"')
                filled = text.format(base=self._base, port=port, key=key, model=model)
                ui.html(code_block(filled, language))

    async def close(self) -> None:
        """Nothing is open."""
