"""What a start leaves out until it is asked for, seen in processes of their own."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_server.starting import for_good
from tests.support.tiny import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", context=256)


def told(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_tokenizer_is_loaded_without_reading_what_all_models_export(folder: Path) -> None:
    program = """
import sys
from pathlib import Path
from mlx_server.models.text.tokenizer import load_tokenizer
wrapper = load_tokenizer(Path(sys.argv[1]), False)
assert wrapper.encode("a")
print(type(sys.modules["transformers"]).__name__, type(sys.modules["transformers.models"]).__name__)
"""
    assert told(program, str(folder)) == "Narrow Narrow"


def test_whoever_asks_for_another_name_gets_transformers_as_it_is() -> None:
    program = """
from mlx_server.models.text.tokenizer import import_tokenizers
import_tokenizers()
import transformers
from transformers import AutoTokenizer, utils
before = AutoTokenizer, transformers.__version__, utils
from transformers import BertConfig
from transformers.models import BertConfig as same
import transformers as whole
assert BertConfig is same is whole.BertConfig is transformers.BertConfig
assert before == (whole.AutoTokenizer, whole.__version__, whole.utils)
try:
    transformers.Nothing
except AttributeError:
    print(type(whole).__name__)
"""
    assert told(program) == "_LazyModule"


def test_an_engine_imports_models_without_tokenizers_and_the_hub() -> None:
    program = """
import sys
from mlx_server.engine.run.patches import leave_out_text_side
leave_out_text_side()
from mlx_lm import utils
print({"transformers", "huggingface_hub"} & sys.modules.keys() or "neither")
import huggingface_hub
print(callable(huggingface_hub.hf_hub_download), callable(utils.snapshot_download))
"""
    assert told(program).splitlines() == ["neither", "True True"]


def test_no_protocol_s_schema_is_built_before_it_is_asked_for() -> None:
    program = """
from mlx_server.main import create_app
from mlx_server.config import Settings
from mlx_server.schemas.anthropic.requests import MessagesRequest
from mlx_server.schemas.openai.chat import ChatCompletionRequest
app = create_app(Settings.load(None))
kinds = MessagesRequest, ChatCompletionRequest
print([kind.__pydantic_complete__ for kind in kinds])
assert app.openapi()["paths"]
"""
    assert told(program) == "[False, False]"


def test_what_is_made_for_good_is_left_to_itself_and_the_rest_is_not() -> None:
    before = gc.get_freeze_count()
    with for_good():
        assert not gc.isenabled()
        kept = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(one is kept for one in gc.get_objects())
    with pytest.raises(KeyError), for_good():
        {}["nothing"]
    assert gc.isenabled()
