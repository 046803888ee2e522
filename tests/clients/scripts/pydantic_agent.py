"""MODEL URL openai|anthropic PROMPT: an agent of pydantic-ai's."""

import asyncio
import sys

from anthropic import AsyncAnthropic
from pydantic_ai import Agent, Tool
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from tools import TOOLS

name, url, provider, prompt = sys.argv[1:]
if provider == "openai":
    openai = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
    model = OpenAIChatModel(name, provider=openai)
else:
    client = AsyncAnthropic(base_url=url, api_key="unused")
    model = AnthropicModel(name, provider=AnthropicProvider(anthropic_client=client))
# A grammar writes what it forces as other tokens than those of the rehearsed script.
tools = [Tool(one, strict=False) for one in TOOLS]
agent = Agent(model, tools=tools, instructions="You are a careful agent.")
print(asyncio.run(agent.run(prompt)).output)
