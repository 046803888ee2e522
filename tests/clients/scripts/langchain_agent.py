"""MODEL URL openai|anthropic PROMPT: LangChain's own agent."""

import sys

from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from tools import TOOLS

name, url, provider, prompt = sys.argv[1:]
if provider == "openai":
    model = ChatOpenAI(model=name, base_url=f"{url}/v1", api_key="unused", stream_usage=True)
else:
    model = ChatAnthropic(model=name, base_url=url, api_key="unused", max_tokens=1000)
agent = create_agent(model, tools=list(TOOLS), system_prompt="You are a careful agent.")
state = agent.invoke({"messages": [{"role": "user", "content": prompt}]})
print(state["messages"][-1].text)
assert all(one.usage_metadata["input_tokens"] for one in state["messages"] if one.type == "ai")
