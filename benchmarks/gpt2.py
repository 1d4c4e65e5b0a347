"""The train step of the GPT-2 of Hugging Face transformers in PyTorch, on CPU, in the form that is fastest: what ours is compared with.

Shapes are those of our model: width, depth, heads, context, vocabulary, MLP of 4 * width, readout tied or not; no dropout; initial
parameters are made here. Its activation is PyTorch's own GELU (tanh), which is faster than the composed one that GPT-2's config names.
"""

import time
from collections.abc import Callable
from typing import Any


def gpt2(program: dict[str, Any]) -> tuple[Callable[[int], None], dict[str, Any]]:
    """Steps in one precision, "float32", "autocast" (float32 parameters, bfloat16 products) or "bfloat16" (parameters and AdamW's moments
    too), "eager" or "compiled", with whichever of transformers' attentions and PyTorch's AdamWs is fastest here; `form` says which."""
    import torch
    from machine import cores

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    shape = (program["sequences"], program["fields"]["model.context"] + 1)
    tokens_BxL = torch.randint(program["fields"]["model.vocab_size"], shape)
    fastest, seconds = None, float("inf")
    for attention in ("eager", "sdpa"):
        model, loss = _loss(program, attention)
        for way in ("fused", "foreach"):
            steps = _steps(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-5, **{way: True}), tokens_BxL)
            steps(2)  # compiles
            took = min(_seconds(steps, 2) for _ in range(3))
            if took < seconds:
                fastest, form, seconds = steps, f"{attention} attention, {way} AdamW", took
    return fastest, {"form": form}


def _seconds(steps: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    steps(count)
    return time.perf_counter() - started


def _loss(program: dict[str, Any], attention: str) -> tuple[Any, Callable[[Any], Any]]:
    """The model, and the loss of tokens [B, L + 1]."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = program["fields"]
    config = GPT2Config(
        vocab_size=fields["model.vocab_size"],
        n_positions=fields["model.context"],
        n_embd=fields["model.width"],
        n_layer=fields["model.depth"],
        n_head=fields["model.width"] // fields["model.head_dim"],
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=fields.get("model.tied_embeddings", False),
        use_cache=False,
        attn_implementation=attention,
    )
    model = GPT2LMHeadModel(config).train()
    if program["precision"] == "bfloat16":
        model = model.to(torch.bfloat16)

    def loss(tokens_BxL: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=program["precision"] == "autocast"):
            logits_BxLxV = model(input_ids=tokens_BxL[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits_BxLxV.flatten(0, 1).float(), tokens_BxL[:, 1:].flatten())

    return model, torch.compile(loss) if program["mode"] == "compiled" else loss


def _steps(model: Any, loss: Callable[[Any], Any], optimizer: Any, tokens_BxL: Any) -> Callable[[int], None]:
    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss(tokens_BxL).backward()
            optimizer.step()

    return steps
