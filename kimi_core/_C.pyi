"""
The compiled core of kimi_core. It links neither libtorch nor CUDA's runtime.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['RepeatDetector', 'instruction_sets', 'push_all', 'tile_gradient', 'tile_statistics']
class RepeatDetector:
    """
    Notices when a sequence goes round in a loop.
    
    After every token it knows whether the last `window` tokens have now occurred `count` times in the
    sequence; occurrences may overlap, and the one just completed is included. A push costs the same
    however long the sequence is. Not for two threads at once.
    
    Raises:
        ValueError: window < 1 or count < 2.
    """
    def __init__(self, window: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def extend(self, token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> int:
        """
        Append int32 `[n]` tokens, all of them.
        
        Returns the index of the first at which `push` would have been True, or -1.
        
        Raises:
            TypeError: `token_ids` does not convert to int32 without loss.
            ValueError: `token_ids` is not one-dimensional.
        """
    def push(self, token: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Append one token; True if the last `window` tokens now stand at least `count` times.
        """
    def reset(self) -> None:
        """
        Forget every token; `window` and `count` stay.
        """
    def size(self) -> int:
        """
        Tokens pushed since the start or the last reset.
        """
    @property
    def count(self) -> int:
        ...
    @property
    def window(self) -> int:
        ...
def instruction_sets() -> list[str]:
    """
    Instruction sets that the passes below can use here, the fastest last.
    """
def push_all(detectors: collections.abc.Sequence[RepeatDetector], token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> numpy.typing.NDArray[numpy.bool]:
    """
    Push `token_ids[i]` into `detectors[i]` for a whole decoding step, in one call.
    
    Args:
        detectors: n detectors.
        token_ids: int32 `[n]`.
    
    Returns:
        bool `[n]`: what each `push` returned.
    
    Raises:
        TypeError: `token_ids` does not convert to int32 without loss, or an item of `detectors` is no
            RepeatDetector.
        ValueError: the two differ in length, or `token_ids` is not one-dimensional.
    
    An error leaves every detector as it was.
    """
def tile_gradient(logits: numpy.typing.NDArray[numpy.float32], targets: numpy.typing.NDArray[numpy.int64], top: numpy.typing.NDArray[numpy.float32], total: numpy.typing.NDArray[numpy.float64], outer: numpy.typing.NDArray[numpy.float32], bias: numpy.typing.NDArray[numpy.float32] | None = None, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, temperature: typing.SupportsFloat | typing.SupportsIndex = 1.0, threads: typing.SupportsInt | typing.SupportsIndex = 1, instruction_set: str | None = None) -> None:
    """
    Overwrite logits by the gradient of sum(outer * logprob(targets)) in them.
    
    Args:
        logits, targets, bias, softcap, temperature, threads, instruction_set: as in `tile_statistics`.
        top, total: its results; of the whole vocabulary, where the tile is a part of it.
        outer: float32 `[rows]`.
    
    Raises:
        TypeError, ValueError: as `tile_statistics`, and ValueError if `logits` is read-only.
    """
def tile_statistics(logits: numpy.typing.NDArray[numpy.float32], targets: numpy.typing.NDArray[numpy.int64], bias: numpy.typing.NDArray[numpy.float32] | None = None, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, temperature: typing.SupportsFloat | typing.SupportsIndex = 1.0, threads: typing.SupportsInt | typing.SupportsIndex = 1, instruction_set: str | None = None) -> tuple:
    """
    Softmax statistics of the rows of a tile of logits.
    
    Scores are logits + bias, capped to softcap * tanh(scores / softcap) unless softcap is 0; x is
    (score - top) / temperature.
    
    Args:
        logits: float32 `[rows, vocab]`, C-contiguous.
        targets: int64 `[rows]` in [0, vocab); -1 where the target is in another part of the vocabulary.
        bias: float32 `[vocab]`.
        threads: rows are divided among so many.
        instruction_set: one of `instruction_sets()`; None: the fastest.
    
    Returns:
        top float32, the largest score; total float64, the sum of exp(x); picked float32, the target's x,
        0 without a target; weighted float64, the sum of exp(x) * x. Each `[rows]`.
    
    Raises:
        TypeError: an array has another dtype or layout.
        ValueError: a shape does not fit, a target is out of range, or a number is not positive.
    """
