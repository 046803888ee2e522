"""The /commands of a chat, and what they refuse."""

import json
from pathlib import Path

import pytest

from mlx_server.cli.chat import slash
from mlx_server.cli.chat.conversation import Conversation
from mlx_server.cli.options import CommandError
from mlx_server.cli.remote import Remote

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture
def session() -> slash.Session:
    """After one question and its answer."""
    conversation = Conversation(Remote("http://127.0.0.1:9", None), "tiny", messages=list(TALK))
    return slash.Session(conversation)


def test_sampling_is_set_shown_and_given_back(session: slash.Session) -> None:
    slash.run("/set temperature 0.5", session)
    slash.run("/set max_tokens 7", session)
    assert session.conversation.sampling == {"temperature": 0.5, "max_tokens": 7}
    assert slash.run("/set", session) == "temperature 0.5, max_tokens 7"
    slash.run("/set temperature", session)
    assert session.conversation.sampling == {"max_tokens": 7}


def test_a_question_is_asked_again_or_taken_back(session: slash.Session) -> None:
    slash.run("/retry", session)
    assert session.retry == "one"
    assert session.conversation.messages == []
    with pytest.raises(CommandError, match="nothing to take back"):
        slash.run("/undo", session)


def test_a_file_goes_with_the_next_question_only(session: slash.Session, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("to do\n")
    slash.run(f"/file {tmp_path / 'notes.txt'}", session)
    assert session.question("What?") == "notes.txt:\n```\nto do\n```\n\nWhat?"
    assert session.question("What?") == "What?"


def test_answers_follow_a_schema_until_it_is_off(session: slash.Session, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object"}))
    slash.run(f"/schema {tmp_path / 'schema.json'}", session)
    assert session.conversation.schema == {"type": "object"}
    slash.run('/schema {"type": "array"}', session)
    assert session.conversation.schema == {"type": "array"}
    slash.run("/schema off", session)
    assert session.conversation.schema is None


def test_a_conversation_is_saved_and_cleared(session: slash.Session, tmp_path: Path) -> None:
    slash.run(f"/save {tmp_path / 'talk.md'}", session)
    assert (tmp_path / "talk.md").read_text() == "## user\n\none\n\n## assistant\n\ntwo\n"
    slash.run("/clear", session)
    assert session.conversation.messages == []


def test_help_names_every_command(session: slash.Session) -> None:
    told = slash.run("/help", session)
    assert all(f"/{name}" in told for name in slash.COMMANDS)


@pytest.mark.parametrize(
    "line",
    [
        "/nothing",
        "/set colour 3",
        "/set temperature warm",
        "/set temperature nan",
        '/set temperature "1"',
        "/schema [1]",
        "/schema {",
        "/file /nowhere",
        "/save",
        "/save /nowhere/file",
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(session: slash.Session, line: str) -> None:
    with pytest.raises(CommandError):
        slash.run(line, session)
    assert session.conversation.messages == TALK
    assert session.conversation.sampling == {}
    assert session.conversation.schema is None


def test_what_got_no_answer_is_asked_again_with_what_was_attached(session: slash.Session) -> None:
    session.unanswered = "a file\n\nWhat?"
    slash.run("/retry", session)
    assert session.retry == "a file\n\nWhat?"
    assert session.conversation.messages == TALK


@pytest.mark.parametrize("line", ["/exit", "/quit", "/bye"])
def test_names_that_other_programs_have_for_leaving_are_known(
    session: slash.Session, line: str
) -> None:
    slash.run(line, session)
    assert session.ended
