"""Parameters shared by chat completions and completions."""

from mlx_server.api.sampling import left_to_model, with_greedy
from mlx_server.engine.protocol import Sampling
from mlx_server.errors import BadRequest
from mlx_server.schemas.internal import Constraint
from mlx_server.schemas.openai.common import ANY_SEED, GenerationRequest
from mlx_server.schemas.openai.constraints import (
    ConstrainedRequest,
    ResponseFormat,
    StructuredOutputs,
)


def sampling(body: GenerationRequest) -> Sampling:
    return with_greedy(
        Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias,
        )
    )


def unasked(body: GenerationRequest) -> frozenset[str]:
    return left_to_model(sampling(body), body.model_fields_set)


def stop_strings(body: GenerationRequest) -> tuple[str, ...]:
    stops = [body.stop] if isinstance(body.stop, str) else body.stop
    return tuple(filter(None, stops))


def seed(body: GenerationRequest) -> int | None:
    return None if body.seed == ANY_SEED else body.seed


def check_choices(n: int, max_choices: int) -> None:
    """Raises BadRequest."""
    if n > max_choices:
        raise BadRequest(f"`n` is at most {max_choices} on this server.", param="n")


def as_list(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str] | list[list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def constraint(body: ConstrainedRequest) -> Constraint | None:
    """Raises BadRequest for several constraints."""
    asked = _constraints(body)
    if len(asked) > 1:
        raise BadRequest(
            f"`{asked[0].param}` and `{asked[1].param}` both bind the answer: give one.",
            param=asked[1].param,
        )
    if asked and body.ignore_eos:
        raise BadRequest(
            f"`ignore_eos` would go on past the end that `{asked[0].param}` sets.",
            param="ignore_eos",
        )
    return asked[0] if asked else None


def _constraints(body: ConstrainedRequest) -> list[Constraint]:
    asked = [
        Constraint("json_schema", body.guided_json, "guided_json"),
        Constraint("regex", body.guided_regex, "guided_regex"),
        Constraint("choice", body.guided_choice, "guided_choice"),
        Constraint("grammar", body.guided_grammar, "guided_grammar"),
        Constraint("grammar", body.grammar or None, "grammar"),
        Constraint("json_schema", body.json_schema, "json_schema"),
    ]
    given = [one for one in asked if one.value is not None]
    if body.structured_outputs is not None:
        given += _structured_outputs(body.structured_outputs, "structured_outputs")
    if body.response_format is not None:
        given += _response_format(body.response_format, "response_format")
    return given


def _structured_outputs(outputs: StructuredOutputs, param: str) -> list[Constraint]:
    asked = [
        Constraint("json_schema", outputs.json_, f"{param}.json"),
        Constraint("regex", outputs.regex, f"{param}.regex"),
        Constraint("choice", outputs.choice, f"{param}.choice"),
        Constraint("grammar", outputs.grammar, f"{param}.grammar"),
    ]
    given = [one for one in asked if one.value is not None]
    if outputs.json_object:
        given.append(Constraint("json_object", None, f"{param}.json_object"))
    return given


def _response_format(form: ResponseFormat, param: str) -> list[Constraint]:
    if form.type == "text":
        return []
    schema = form.schema_
    if form.type == "json_schema" and form.json_schema is not None:
        schema = form.json_schema.schema_
    if schema is not None:
        return [Constraint("json_schema", schema, param)]
    return [Constraint("json_object", None, param)]
