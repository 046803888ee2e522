"""The real MiniLM: the numbers of the formulae, meanings in order, and the official SDK."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import psutil
import pytest
from tokenizers import Tokenizer

from tests.support.bert import ReferenceEncoder
from tests.support.demo import pulled
from tests.support.server import Server, serving

MODEL = "all-minilm-l6-v2"
WIDTH = 384
TOLERANCE = 1e-4
MEMORY_LIMIT = 400_000_000

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The cat sits outside in the garden.",
    "A kitten is sitting out in the yard.",
    "How do I reset my password?",
    "I forgot my login; what can I do?",
    "The stock market fell sharply on Monday.",
    "Share prices dropped steeply at the start of the week.",
    "She plays the violin in an orchestra.",
    "He is a drummer in a rock band.",
    "Water boils at 100 degrees Celsius at sea level.",
    "Paris is the capital of France.",
    "What is the largest city of France?",
    "def add(a, b): return a + b",
    "A function that sums two numbers in Python.",
    "Yes.",
    "Für naïve Gäste: café & façade! 日本語 🙂",
    "UPPER CASE and   odd    spaces\nand lines",
    "The history of the bridge begins in 1842, when " + "a ferry crossed the river; " * 20,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
]
PARAPHRASES = [(0, 1), (2, 3), (4, 5), (6, 7), (13, 14)]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder of the embedding model."""
    return pulled(MODEL)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(folder.parent, target_is_directory=True)
    with serving(home, "--model", MODEL, memory_limit=str(MEMORY_LIMIT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=240,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    ) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """The sentences' vectors by the formulae: (sentences, width)."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    reference = ReferenceEncoder(folder)
    return np.array([reference.mean(tokenizer.encode(text).ids) for text in SENTENCES])


def test_twenty_sentences_agree_with_a_reference_batched(
    client: openai.OpenAI, expected: np.ndarray
) -> None:
    answer = client.embeddings.create(model=MODEL, input=SENTENCES)
    vectors = np.array([one.embedding for one in answer.data])
    assert vectors.shape == (len(SENTENCES), WIDTH)
    assert np.abs(vectors - expected).max() < TOLERANCE


def test_twenty_sentences_agree_with_a_reference_alone(
    client: openai.OpenAI, expected: np.ndarray
) -> None:
    for text, vector in zip(SENTENCES, expected, strict=True):
        answer = client.embeddings.create(model=MODEL, input=text, encoding_format="float")
        assert np.abs(np.array(answer.data[0].embedding) - vector).max() < TOLERANCE


def test_a_paraphrase_is_nearer_than_any_other_sentence(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=SENTENCES)
    vectors = np.array([one.embedding for one in answer.data])
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors))
    for one, other in PARAPHRASES:
        assert (cosines[one].argmax(), cosines[other].argmax()) == (other, one)


def test_the_sdks_own_base64_is_read_as_the_numbers(client: openai.OpenAI) -> None:
    encoded = client.embeddings.create(model=MODEL, input=SENTENCES[:3])
    plain = client.embeddings.create(model=MODEL, input=SENTENCES[:3], encoding_format="float")
    for ours, theirs in zip(encoded.data, plain.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, abs=1e-6)
    short = client.embeddings.create(model=MODEL, input=SENTENCES[0], dimensions=64)
    assert len(short.data[0].embedding) == 64
    assert math.hypot(*short.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_the_sdk_is_told_which_text_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model=MODEL, input=["short", "long " * 300])
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.param == "input.1"


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.soak)])
async def test_many_texts_in_one_call_stay_within_the_memory_limit(
    client: openai.OpenAI, server: Server, count: int
) -> None:
    texts = [f"{SENTENCES[i % 18]} It is number {i} of many." for i in range(count)]
    answer = client.embeddings.create(model=MODEL, input=texts)
    assert [one.index for one in answer.data] == list(range(count))
    status = (await server.models())[MODEL]
    assert status["need"] <= MEMORY_LIMIT
    assert status["memory"]["peak"] <= status["need"]
    [engine] = server.engines()
    assert resident(engine) < MEMORY_LIMIT
    again = client.embeddings.create(model=MODEL, input=texts[::99])
    for ours, theirs in zip(again.data, answer.data[::99], strict=True):
        assert np.abs(np.array(ours.embedding) - np.array(theirs.embedding)).max() < TOLERANCE


def resident(process: psutil.Process) -> int:
    """Bytes of memory that a process holds."""
    return int(process.memory_info().rss)
