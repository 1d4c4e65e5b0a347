"""Text from a model, token by token, with a key/value cache."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from scaling_jax.data.tokenizers import Tokenizer
from scaling_jax.model import Cache, Transformer


class Sampling(NamedTuple):
    """How a token is drawn. `temperature` divides the logits, 0 takes the most likely token; `top_p` as in `nucleus`."""

    temperature: float = 1.0
    top_p: float = 1.0


def nucleus(logits_V: Array, top_p: Array | float) -> Array:
    """Logits of the smallest set of tokens whose probability reaches top_p, -inf elsewhere (Holtzman et al. 2020, section 3.1).

    The set has at least one token, and all of them at top_p 1; of equally likely ones at its edge those of smaller numbers are in it.
    """
    order_V = jnp.argsort(-logits_V, stable=True)
    p_V = jax.nn.softmax(logits_V)[order_V]
    likelier_V = jnp.cumsum(p_V) - p_V  # what comes before; 0 of the first
    kept_V = jnp.zeros_like(p_V, bool).at[order_V].set((likelier_V < top_p) | (top_p >= 1))
    return jnp.where(kept_V, logits_V, -jnp.inf)


@partial(jax.jit, static_argnames=("greedy", "vocab_size"))
def _draw(logits_V: Array, key: Array, n: Array | int, temperature: Array, top_p: Array, *, greedy: bool, vocab_size: int) -> Array:
    logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < vocab_size, logits_V, -jnp.inf)
    if greedy:
        return jnp.argmax(logits_V)
    # Less the largest, so that no temperature, however small, makes an infinity of it.
    return jax.random.categorical(jax.random.fold_in(key, n), nucleus((logits_V - jnp.max(logits_V)) / temperature, top_p))


def draw(logits_V: Array, key: Array, n: Array | int, sampling: Sampling, vocab_size: int) -> Array:
    """Token n of those drawn with `key`, int32 scalar, below the tokenizer's vocab_size, which the unembedding's may exceed."""
    temperature = np.float32(max(sampling.temperature, float(np.finfo(np.float32).tiny)))
    greedy = sampling.temperature == 0
    return _draw(logits_V, key, n, temperature, np.float32(sampling.top_p), greedy=greedy, vocab_size=vocab_size)


class Reader:
    """A model that reads one token after another, and knows the logits of the next.

    It sees the `window`, at most `context` tokens: of a longer text to start with the last `context`; later, when there is no room for
    a token more, the window's last half, the new token included, is read anew, from position 0. Two programs are compiled, whatever the
    length of what is read: the whole context at once, padded, and one token.
    """

    def __init__(self, model: Transformer):
        self.context = model.config.context
        graph, self._params = nnx.split(model)

        def fill(params: nnx.State, tokens_1xM: Array, length: Array) -> Cache:
            model = nnx.merge(graph, params)
            _, cache = model.extend(tokens_1xM, model.new_cache(1))
            return cache._replace(length=length)  # the padding lies beyond it, where no later token looks

        def extend(params: nnx.State, token: Array, cache: Cache) -> tuple[Array, Cache]:
            logits_1x1xV, cache = nnx.merge(graph, params).extend(token.reshape(1, 1), cache)
            return logits_1x1xV[0, 0], cache

        self._fill, self._extend = jax.jit(fill), jax.jit(extend, donate_argnums=2)
        self.window: list[int] = []

    def start(self, tokens: Sequence[int]) -> Array:
        """Logits [V] of the token that follows `tokens`, of which there is at least one; what was read before is forgotten."""
        self.window = [int(token) for token in tokens][-self.context :]
        padded_1xM = np.zeros((1, self.context), np.int32)
        padded_1xM[0, : len(self.window) - 1] = self.window[:-1]
        self._cache = self._fill(self._params, padded_1xM, np.int32(len(self.window) - 1))
        return self._read(self.window[-1])

    def read(self, token: int) -> Array:
        """Logits [V] of the token that follows, once `token` is read too."""
        if len(self.window) == self.context:
            kept = max(1, self.context // 2)
            return self.start([*self.window, int(token)][-kept:])
        self.window.append(int(token))
        return self._read(token)

    def _read(self, token: int) -> Array:
        logits_V, self._cache = self._extend(self._params, np.int32(token), self._cache)
        return logits_V


def sample_tokens(reader: Reader, tokens: Sequence[int], tokenizer: Tokenizer, key: Array, sampling: Sampling) -> Iterator[int]:
    """Tokens that follow `tokens`, without end; after the end token it goes on with another document.

    The same key gives the same tokens.
    """
    logits_V = reader.start(tokens)
    n = 0
    while True:
        token = int(draw(logits_V, key, n, sampling, tokenizer.vocab_size))
        yield token
        logits_V, n = reader.read(token), n + 1


class TextStream:
    """Text of tokens as they come, in whole characters: of one that is spread over several tokens nothing before its last.

    Args:
      tokenizer: of the tokens.
      before: tokens that come before the first one, for a tokenizer that writes a word's first token differently at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._shown, self._new = list(before)[-8:], []  # a few suffice to know how the next begins

    def add(self, token: int) -> str:
        """What can be shown now."""
        self._new.append(token)
        text = self._text()
        if text.endswith("\ufffd"):  # the beginning of a character, as far as can be told
            return ""
        self._shown, self._new = self._new, []
        return text

    def end(self) -> str:
        """What was held back; characters that were not completed are U+FFFD."""
        return self._text() if self._new else ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._shown + self._new)[len(self._tokenizer.decode(self._shown)) :]
