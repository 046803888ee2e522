"""MODEL URL openai|anthropic PROMPT: a graph of LangGraph's, token by token."""

import sys

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from tools import TOOLS

name, url, provider, prompt = sys.argv[1:]
if provider == "openai":
    model = ChatOpenAI(model=name, base_url=f"{url}/v1", api_key="unused")
else:
    model = ChatAnthropic(model=name, base_url=url, api_key="unused", max_tokens=1000)
model = model.bind_tools(TOOLS)


def answer(state):
    return {"messages": [model.invoke(state["messages"])]}


graph = StateGraph(MessagesState)
graph.add_node("answer", answer)
graph.add_node("tools", ToolNode(list(TOOLS)))
graph.add_edge(START, "answer")
graph.add_conditional_edges("answer", tools_condition)
graph.add_edge("tools", "answer")
messages = {"messages": [{"role": "user", "content": prompt}]}
for chunk, facts in graph.compile().stream(messages, stream_mode="messages"):
    if facts["langgraph_node"] == "answer":
        print(chunk.text, end="")
