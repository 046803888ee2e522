"""What has to run once, so that no request waits for a compiler.

On CUDA, MLX compiles kernels when they are first launched, for up to 20 seconds where a request is
the first to ask for log-probabilities, and all streams stand still meanwhile. Each takes
up to a minute where weights are quantized: the first load of a 4-bit model on an H200 took 190
seconds, the next 18.
"""

from mlx_server.engine.protocol import Generate, Sampling

PROMPTS = (17, 33, 81)
"""Tokens: MLX has quantized products for chunks of up to 16, up to 32 and more tokens."""
TOKENS = 4
EVERYTHING = Sampling(
    temperature=0.8,
    top_p=0.9,
    top_k=20,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
)
SAMPLINGS = (EVERYTHING, Sampling(), Sampling(temperature=0))


def requests(longest: int) -> list[Generate]:
    """Requests that differ in what they launch, none longer than `longest` tokens."""
    return [
        Generate(
            id=number,
            prompt=[number] * length,
            sampling=sampling,
            max_tokens=TOKENS,
            logprobs=1,
            prompt_logprobs=1 if number == 0 else None,
        )
        for number, (length, sampling) in enumerate(zip(PROMPTS, SAMPLINGS, strict=True))
        if length + TOKENS <= longest
    ]
