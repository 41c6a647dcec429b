"""
The compiled core of kimi_core. It links neither libtorch nor CUDA's runtime.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['RepeatDetector', 'push_all']
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
