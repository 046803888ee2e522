"""Claude Code."""

from pathlib import Path

from mlx_server.cli.launch.program import Program, Setup, Target

TIERS = ("OPUS", "SONNET", "HAIKU")

LEAST_WINDOW = 100_000
"""It takes a smaller one for this."""
FULL = 80
"""Per cent of the context at which a conversation is compacted."""


def _percentage(context: int) -> int:
    """The same of the window that it knows."""
    return max(1, FULL * context // max(context, LEAST_WINDOW))


def _set_up(target: Target, folder: Path) -> Setup:
    own = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        # A key of the user's would go before the token.
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_MODEL": target.model,
        "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.output),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(max(target.context, LEAST_WINDOW)),
        "CLAUDE_AUTOCOMPACT_PCT_OVERRIDE": str(_percentage(target.context)),
        # These change at the head of every request, and so cost a prefix cache everything.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Setup(own | {f"ANTHROPIC_DEFAULT_{tier}_MODEL": target.model for tier in TIERS})


PROGRAM = Program(
    name="claude",
    title="Claude Code",
    executable="claude",
    install="npm install -g @anthropic-ai/claude-code",
    needs=13_000,
    recommended=64_000,
    set_up=_set_up,
)
