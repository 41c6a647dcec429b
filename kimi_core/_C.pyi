"""
The compiled core of kimi_core. It links neither libtorch nor CUDA's runtime.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import os
import typing
import typing_extensions
__all__: list[str] = ['RepeatDetector', 'RolloutBuffer', 'SegmentView', 'WeightArena', 'WeightLease', 'balance', 'crc32c', 'instruction_sets', 'push_all', 'spawn', 'tile_gradient', 'tile_statistics']
class SegmentView:
    """
    The tokens of one segment where they lie in the file, read-only.
    
    The arrays stay readable, but after an eviction other tokens may come to stand there: what was
    computed from them holds if `is_current()` is true afterwards.
    """
    def is_current(self) -> bool:
        """
        Whether it has not been evicted.
        """
    @property
    def parts(self) -> list:
        """
        (token_ids, logprobs, mask) for each page that it touches.
        """
    @property
    def policy_version(self) -> int:
        ...
    @property
    def start(self) -> int:
        """
        Position of its first token.
        """
class RolloutBuffer:
    """
    What kimi_core.buffer.RolloutBuffer is made from; use that one.
    """
    @staticmethod
    def _create(path: str, capacity_tokens: typing.SupportsInt | typing.SupportsIndex, max_trajectories: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex, max_prompts: typing.SupportsInt | typing.SupportsIndex, sync_interval_ms: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @staticmethod
    def file_bytes(capacity_tokens: typing.SupportsInt | typing.SupportsIndex, max_trajectories: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex = 256) -> int:
        """
        Bytes of the file of such a buffer, on disk and mapped.
        """
    @staticmethod
    def tokens_taken(tokens: typing.SupportsInt | typing.SupportsIndex, segments: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex = 256) -> int:
        """
        What a trajectory of so many tokens in so many segments takes of `capacity_tokens`.
        
        It takes whole pages, and further ones to list its pages and segments where they are many.
        """
    def __init__(self, path: str, readonly: bool) -> None:
        ...
    def _append(self, arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: typing.SupportsInt | typing.SupportsIndex, arg5: str | None, arg6: typing.SupportsInt | typing.SupportsIndex | None) -> int:
        ...
    def _pack(self, trajectory_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], out: tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32]] | None = None) -> tuple:
        """
        The columns, cu_seqlens, and how many tokens were packed.
        """
    def _read(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> tuple:
        """
        Prompt, group, token_ids, logprobs, mask, policy_versions and end reason.
        """
    def _scan(self) -> list:
        """
        Trajectory, prompt, group, length, end reason; oldest first.
        """
    def _stats(self) -> dict:
        ...
    def append_many(self, trajectory_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], logprobs: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], mask: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8], cu_seqlens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], policy_versions: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], *, end_reasons: collections.abc.Sequence[str | None] | None = None, leases: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None] | None = None) -> numpy.typing.NDArray[numpy.int64]:
        """
        Add segments in one call, each as `append` does, in order; several times as fast.
        
        An error leaves everything as it was. A crash may leave the first few of them.
        
        Args:
            trajectory_ids: int64 `[n]`; one may stand more than once.
            token_ids, logprobs, mask: of all segments end to end, `[t]`.
            cu_seqlens: int32 `[n + 1]`; segment `i` is tokens `cu_seqlens[i]:cu_seqlens[i + 1]`.
            policy_versions: int32 `[n]`.
            end_reasons, leases: one a segment.
        
        Returns:
            int64 `[n]`: the length of each trajectory behind its segment.
        
        Raises: as `append`.
        """
    def begin(self, prompt_id: typing.SupportsInt | typing.SupportsIndex, group_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Open an empty trajectory and return its id. Ids count up from 0 and are never used twice.
        
        Raises:
            ValueError: every slot is taken.
        """
    def close(self) -> None:
        """
        Unmap the file; once the views of it are gone, too. A closed buffer can be closed again.
        """
    def draw(self, count: typing.SupportsInt | typing.SupportsIndex, *, seed: typing.SupportsInt | typing.SupportsIndex, floor: typing.SupportsFloat | typing.SupportsIndex = 0.05, prior_weight: typing.SupportsFloat | typing.SupportsIndex = 2.0) -> list[int]:
        """
        Draw `count` different prompts of 0 .. max_prompts - 1, hard ones sooner.
        
        The chance of a prompt is in proportion to `max(1 - rate, floor)`. Its rate is that of the responses
        counted, mixed with `prior_weight` responses' worth of the rate of all prompts. The same seed and
        counts give the same draw everywhere.
        
        Raises:
            ValueError: `floor` is not in (0, 1], or `prior_weight` not above 0.
        """
    def evict(self, trajectory_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], *, stale_before: typing.SupportsInt | typing.SupportsIndex | None = None, free_tokens: typing.SupportsInt | typing.SupportsIndex | None = None) -> list[int]:
        """
        Forget trajectories and free their pages; returns the ids, in this order:
        
        1. those of `trajectory_ids`: what has been consumed;
        2. with `stale_before`, those whose newest policy version is older than that;
        3. with `free_tokens`, the oldest, until pages for so many tokens are free.
        
        Raises:
            KeyError: one of `trajectory_ids` does not exist; nothing is evicted then.
        """
    def finish(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex, reason: str) -> None:
        """
        End a trajectory by "stop", "length" or "repeat"; it takes no more segments.
        
        Raises:
            KeyError: there is no such trajectory.
            ValueError: the reason is unknown, or it has ended before.
        """
    def flush(self) -> None:
        """
        Return when everything appended so far is on disk.
        
        Raises:
            OSError: the disk failed, now or in the background since the last call.
        """
    def prompt_counts(self, prompt_id: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, float]:
        """
        Responses counted for a prompt, and the sum of their correctness.
        
        Raises:
            IndexError: `prompt_id` is not below `max_prompts`.
        """
    def record_result(self, prompt_id: typing.SupportsInt | typing.SupportsIndex, correctness: typing.SupportsFloat | typing.SupportsIndex) -> None:
        """
        Count one response to a prompt; correctness is clipped to [0, 1].
        
        Raises:
            ValueError: `prompt_id` is not below `max_prompts`.
        """
    def resume(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        A new lease on an unfinished trajectory; appends that name an older one are refused.
        
        Raises:
            KeyError: there is no such trajectory.
            ValueError: it has ended.
        """
    def segments(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> list:
        """
        The segments of a trajectory as (start, length, policy version), in order.
        
        Raises:
            KeyError: there is no such trajectory.
        """
    def snapshot(self, path: os.PathLike | str | bytes) -> None:
        """
        Write a copy to `path`, whole or not at all, and on disk on return. Free pages take no room.
        
        Raises:
            OSError: there is no room, or any other fault of the disk.
        """
    def view(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex, segment: typing.SupportsInt | typing.SupportsIndex) -> SegmentView:
        """
        One segment in place, nothing copied.
        
        Raises:
            KeyError: there is no such trajectory.
            IndexError: it has no such segment.
        """
    @property
    def mark(self) -> int:
        """
        A number of the owner's in the file, 0 to begin with and below 2^56.
        """
    @mark.setter
    def mark(self, arg1: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def path(self) -> str:
        ...
    @property
    def readonly(self) -> bool:
        ...
    @property
    def recovery(self) -> dict:
        """
        What opening for writing found: `trajectories` and `tokens` that are sound, `cuts` as
        (trajectory, tokens kept, tokens lost), `slots_lost` and `prompts_lost`.
        """
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
class WeightLease:
    """
    What kimi_core.weights.arena.Lease is made from; use that one.
    """
    def release(self) -> None:
        ...
    @property
    def held(self) -> bool:
        ...
    @property
    def slot(self) -> int:
        ...
    @property
    def version(self) -> int:
        ...
class WeightArena:
    """
    What kimi_core.weights.arena.WeightArena is made from; use that one.
    """
    @staticmethod
    def _create(path: str, slots: typing.SupportsInt | typing.SupportsIndex, payload_bytes: typing.SupportsInt | typing.SupportsIndex, layout_hash: bytes, regions: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]], description: str) -> None:
        ...
    def __init__(self, path: str, readonly: bool) -> None:
        ...
    def _abandon(self, slot: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def _acquire(self) -> WeightLease:
        ...
    def _begin(self, version: typing.SupportsInt | typing.SupportsIndex) -> int | None:
        """
        A slot to write `version` into; None where none is idle now.
        """
    def _commit(self, slot: typing.SupportsInt | typing.SupportsIndex, version: typing.SupportsInt | typing.SupportsIndex, crcs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def _crcs(self, slot: typing.SupportsInt | typing.SupportsIndex) -> list[int]:
        ...
    def _first_damaged(self, slot: typing.SupportsInt | typing.SupportsIndex, crcs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], threads: typing.SupportsInt | typing.SupportsIndex) -> int | None:
        ...
    def _holders(self) -> list:
        ...
    def _payload(self, slot: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.uint8]:
        """
        Read-only memory, whatever the array says of itself.
        """
    def _writable(self, slot: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.uint8]:
        ...
    def _write(self, slot: typing.SupportsInt | typing.SupportsIndex, sources: collections.abc.Sequence[tuple[numpy.ndarray, str, str, typing.SupportsInt | typing.SupportsIndex]], threads: typing.SupportsInt | typing.SupportsIndex, first: typing.SupportsInt | typing.SupportsIndex = 0, count: typing.SupportsInt | typing.SupportsIndex | None = None) -> list[int]:
        """
        Cast, sum and copy (array, its dtype, the arena's dtype, offset) into `count` regions from `first` on, all of them by default; their checksums.
        """
    def close(self) -> None:
        """
        Let another process publish, and unmap the file, once the views and leases are gone, too. A closed arena can be closed again.
        """
    @property
    def _description(self) -> str:
        ...
    @property
    def _layout_hash(self) -> bytes:
        ...
    @property
    def _regions(self) -> list[tuple[int, int]]:
        ...
    @property
    def active_version(self) -> int | None:
        """
        The version that is served; None before the first one.
        """
    @property
    def path(self) -> str:
        ...
    @property
    def readonly(self) -> bool:
        ...
    @property
    def slots(self) -> int:
        ...
def balance(sizes: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], most: typing.SupportsInt | typing.SupportsIndex) -> list[list[int]]:
    """
    Distribute items over few batches of at most `most` each, of about the same size.
    
    Returns the indices of each batch's items, ascending.
    
    Raises:
        ValueError: one item alone is larger.
    """
def crc32c(data: typing_extensions.Buffer, crc: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
    """
    The CRC32C of what `crc` is the CRC32C of, followed by the bytes of `data`.
    """
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
def spawn(argv: collections.abc.Sequence[str], *, standard: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(3)"], inherited: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], cgroup_procs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], user: typing.SupportsInt | typing.SupportsIndex | None) -> int:
    """
    Start a program with no environment and return its pid, without copying this process.
    
    The kernel kills it when the calling thread ends.
    
    Args:
        argv: the program's path, and its arguments.
        standard: descriptors that become its stdin, stdout and stderr; none is 0, 1 or 2.
        inherited: other descriptors that it keeps, by the same numbers.
        cgroup_procs: descriptors of `cgroup.procs`, open for writing: the cgroups that it is in.
        user: its user, group and only group; None: those of this process.
    
    Raises:
        OSError: a step failed, which the message names; then there is no child.
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
