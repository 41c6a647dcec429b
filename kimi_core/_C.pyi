"""
The compiled core of kimi_core. It does not link libtorch.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import os
import typing
import typing_extensions
__all__: list[str] = ['RepeatDetector', 'RolloutBuffer', 'WeightArena', 'WeightLease', 'balance', 'crc32c', 'decode_attention', 'gather_pages', 'has_device_code', 'instruction_sets', 'push_all', 'spawn', 'tile_gradient', 'tile_statistics']
class RolloutBuffer:
    """
    The C++ base of kimi_core.buffer.RolloutBuffer; use that class.
    """
    @staticmethod
    def _create(path: str, capacity_tokens: typing.SupportsInt | typing.SupportsIndex, max_trajectories: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @staticmethod
    def file_bytes(capacity_tokens: typing.SupportsInt | typing.SupportsIndex, max_trajectories: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex = 256) -> int:
        """
        The most bytes that the file of a buffer of these sizes takes, on disk and in memory.
        """
    @staticmethod
    def tokens_taken(tokens: typing.SupportsInt | typing.SupportsIndex, segments: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex = 256) -> int:
        """
        The part of `capacity_tokens` that one trajectory takes, in tokens.
        
        A trajectory takes whole pages. A long one takes further pages, which list its pages and segments.
        """
    def __init__(self, path: str, readonly: bool) -> None:
        ...
    def _append(self, arg0: typing.SupportsInt | typing.SupportsIndex, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: typing.SupportsInt | typing.SupportsIndex, arg5: str | None, arg6: typing.SupportsInt | typing.SupportsIndex | None) -> int:
        ...
    def _pack(self, trajectory_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], out: tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.float32], numpy.typing.NDArray[numpy.uint8], numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.int32]] | None = None) -> tuple:
        """
        The four columns, cu_seqlens, and the number of tokens packed.
        """
    def _read(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> tuple:
        """
        Prompt id, group id, token_ids, logprobs, mask, policy_versions and end reason.
        """
    def _scan(self) -> list:
        """
        Trajectory, prompt and group id, length and end reason of each trajectory, oldest first.
        """
    def _stage(self, trajectory_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], allocate: collections.abc.Callable) -> tuple:
        """
        Copy whole pages into the uint8 array that `allocate(bytes)` returns.
        
        Returns the array; int32 `[n]` the first page of each trajectory; int32 `[n + 1]` cu_seqlens; and
        the policy version and the length of each segment, in packed order.
        """
    def _stats(self) -> dict:
        ...
    def append_many(self, trajectory_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], logprobs: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], mask: typing.Annotated[numpy.typing.ArrayLike, numpy.uint8], cu_seqlens: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], policy_versions: typing.Annotated[numpy.typing.ArrayLike, numpy.int32], *, end_reasons: collections.abc.Sequence[str | None] | None = None, leases: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex | None] | None = None) -> numpy.typing.NDArray[numpy.int64]:
        """
        Append n segments in order with one call, several times as fast as n calls of `append`.
        
        An error leaves the buffer unchanged. A crash may keep only the first few segments.
        
        Args:
            trajectory_ids: int64 `[n]`; an id may occur more than once.
            token_ids, logprobs, mask: int32, float32 and uint8 `[t]`, all segments end to end.
            cu_seqlens: int32 `[n + 1]`; segment `i` is tokens `cu_seqlens[i]:cu_seqlens[i + 1]`.
            policy_versions: int32 `[n]`.
            end_reasons, leases: one entry for each segment, or None.
        
        Returns:
            int64 `[n]`: the length of the trajectory after each segment, in tokens.
        
        Raises:
            KeyError, ValueError, OSError, TypeError: as `append`.
        """
    def begin(self, prompt_id: typing.SupportsInt | typing.SupportsIndex, group_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Open an empty trajectory and return its id. Ids count up from 0 and are never reused.
        
        Raises:
            ValueError: every slot is in use.
        """
    def close(self) -> None:
        """
        Unmap the file, and let another process write it. Safe to call twice.
        """
    def evict(self, trajectory_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        Remove trajectories and free their pages. An id may occur more than once.
        
        Raises:
            KeyError: one of them does not exist; then none is removed.
        """
    def finish(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex, reason: str) -> None:
        """
        End a trajectory with reason "stop", "length" or "repeat". It takes no further segments.
        
        Raises:
            KeyError: there is no such trajectory.
            ValueError: the reason is unknown, or the trajectory has already ended.
        """
    def flush(self) -> None:
        """
        Return when everything appended so far is on disk.
        
        Raises:
            OSError: the disk failed.
        """
    def resume(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Take a new lease on an unfinished trajectory. Appends that name an older lease are refused.
        
        Raises:
            KeyError: there is no such trajectory.
            ValueError: the trajectory has ended.
        """
    def segments(self, trajectory_id: typing.SupportsInt | typing.SupportsIndex) -> list:
        """
        The segments of a trajectory as (start, length, policy version), in order.
        
        Raises:
            KeyError: there is no such trajectory.
        """
    def snapshot(self, path: os.PathLike | str | bytes) -> None:
        """
        Write a copy to `path`, which is on disk on return. Free pages take no disk space.
        
        The file at `path` is replaced as a whole or not at all.
        
        Raises:
            OSError: the disk is full or failed.
        """
    @property
    def mark(self) -> int:
        """
        A number below 2^56 that the file's owner may set; 0 in a new file.
        """
    @mark.setter
    def mark(self, arg1: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def page_tokens(self) -> int:
        """
        Tokens in a page.
        """
    @property
    def path(self) -> str:
        """
        Path of the file, as given.
        """
    @property
    def readonly(self) -> bool:
        """
        Whether it was opened to read only.
        """
    @property
    def recovery(self) -> dict:
        """
        What opening for writing found, as a dict: the numbers of intact `trajectories` and `tokens`;
        `cuts`, a list of (trajectory, tokens kept, tokens lost); and `slots_lost`, the number of slots with
        damaged ids.
        """
class RepeatDetector:
    """
    Detects that a token sequence repeats itself.
    
    After every token it knows whether the last `window` tokens have occurred `count` times in the
    sequence. Occurrences may overlap, and the last one counts. The cost of a push does not grow with the
    sequence. One thread at a time may use a detector.
    
    Raises:
        ValueError: window < 1 or count < 2.
    """
    def __init__(self, window: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def extend(self, token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> int:
        """
        Append all tokens of an int32 `[n]` array.
        
        Returns the index of the first token at which `push` would have returned True, or -1.
        
        Raises:
            TypeError: `token_ids` does not convert to int32 without loss.
            ValueError: `token_ids` is not one-dimensional.
        """
    def push(self, token: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Append one token. Returns whether the last `window` tokens have occurred `count` times or more.
        """
    def size(self) -> int:
        """
        The number of tokens so far.
        """
class WeightLease:
    """
    The C++ part of a lease; use kimi_core.weights.slots.Lease.
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
    The C++ part of kimi_core.weights.arena.WeightArena; use that class.
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
        Take an idle slot to write `version` into. Returns None if no slot is idle now.
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
        The bytes of a slot. A store there is a segmentation fault, although the array is writable.
        """
    def _writable(self, slot: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.uint8]:
        ...
    def _write(self, slot: typing.SupportsInt | typing.SupportsIndex, sources: collections.abc.Sequence[tuple[numpy.ndarray, str, str, typing.SupportsInt | typing.SupportsIndex]], threads: typing.SupportsInt | typing.SupportsIndex, first: typing.SupportsInt | typing.SupportsIndex = 0, count: typing.SupportsInt | typing.SupportsIndex | None = None) -> list[int]:
        """
        Cast and copy sources (array, its dtype, the arena's dtype, offset) into `count` regions from `first` on, by default all. Returns the checksums of the regions.
        """
    def close(self) -> None:
        """
        Let another process publish, and unmap the file as soon as no view or lease of it exists. Safe to call twice.
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
        The served version; None before the first one.
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
    Split items into few batches of about equal size, each at most `most`.
    
    Returns the indices of the items of each batch, ascending.
    
    Raises:
        ValueError: one item alone is larger than `most`.
    """
def crc32c(data: typing_extensions.Buffer, crc: typing.SupportsInt | typing.SupportsIndex = 0) -> int:
    """
    Extend `crc`, the CRC32C of earlier bytes, by the bytes of `data`. Start with 0.
    """
def decode_attention(query: numpy.typing.NDArray[numpy.float32], keys: numpy.ndarray, values: numpy.ndarray, lengths: numpy.typing.NDArray[numpy.int64], *, scale: typing.SupportsFloat | typing.SupportsIndex, window: typing.SupportsInt | typing.SupportsIndex = 0, threads: typing.SupportsInt | typing.SupportsIndex = 1, instruction_set: str | None = None) -> numpy.typing.NDArray[numpy.float32]:
    """
    Attention of one query per row: softmax(scale * q k) v over the row's own positions.
    
    Keys and values are read once and never beyond a row's length. The result of a row does not depend
    on the other rows or on the number of threads.
    
    Args:
        query: float32 `[rows, heads, dim]`, C-contiguous.
        keys, values: float32, or the bits of bfloat16 as uint16, `[rows, kv_heads, positions, dim]`.
            Rows and heads may lie apart, as in a slice of larger storage.
        lengths: int64 `[rows]`, the positions that each row has, from 1 on.
        scale: factor on q k.
        window: each query sees at most this many positions, the last ones; 0 is all.
        threads: number of threads that share the work.
        instruction_set: one of `instruction_sets()`; None takes the fastest.
    
    Returns:
        float32 `[rows, heads, dim]`.
    
    Raises:
        TypeError: an array has another dtype or layout.
        ValueError: a shape or a length does not fit, or a number is out of range.
    """
def gather_pages(pages: typing.SupportsInt | typing.SupportsIndex, page_tokens: typing.SupportsInt | typing.SupportsIndex, first_pages: typing.SupportsInt | typing.SupportsIndex, cu_seqlens: typing.SupportsInt | typing.SupportsIndex, sequences: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex, token_ids: typing.SupportsInt | typing.SupportsIndex, logprobs: typing.SupportsInt | typing.SupportsIndex, mask: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex | None) -> None:
    """
    Gather staged pages into packed columns, on a CUDA stream or on the host.
    
    On a stream the call only enqueues the work. All arrays are given by the addresses of their memory,
    on the current device or on the host.
    
    Args:
        pages: the pages that `RolloutBuffer._stage` copied, of `page_tokens` tokens each.
        first_pages: int32 `[sequences]`, the page where each sequence begins.
        cu_seqlens: int32 `[sequences + 1]`.
        sequences, tokens: the numbers of sequences and of their tokens.
        token_ids, logprobs, mask: int32, float32 and uint8 `[tokens]`, which are filled.
        stream: a cudaStream_t, 0 for the default stream; None gathers on the host.
    
    Raises:
        RuntimeError: the launch failed, or this module has no device code.
    """
def has_device_code() -> bool:
    """
    Whether this module was built with CUDA kernels.
    """
def instruction_sets() -> list[str]:
    """
    The instruction sets of this processor that the tile passes can use, the fastest last.
    """
def push_all(detectors: collections.abc.Sequence[RepeatDetector], token_ids: typing.Annotated[numpy.typing.ArrayLike, numpy.int32]) -> numpy.typing.NDArray[numpy.bool]:
    """
    Push `token_ids[i]` into `detectors[i]`, for a whole decoding step in one call.
    
    Args:
        detectors: n detectors.
        token_ids: int32 `[n]`.
    
    Returns:
        bool `[n]`: the result of each `push`.
    
    Raises:
        TypeError: `token_ids` does not convert to int32 without loss, or an item of `detectors` is not
            a RepeatDetector.
        ValueError: the two differ in length, or `token_ids` is not one-dimensional.
    
    An error leaves every detector unchanged.
    """
def spawn(argv: collections.abc.Sequence[str], *, standard: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(3)"], inherited: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], cgroup_procs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], user: typing.SupportsInt | typing.SupportsIndex | None) -> int:
    """
    Start a program without an environment and return its pid. This process is not copied.
    
    The kernel kills it when the calling thread ends.
    
    Args:
        argv: the path of the program, and its arguments.
        standard: descriptors that become its stdin, stdout and stderr, none of them 0, 1 or 2.
        inherited: other descriptors that it keeps under the same numbers.
        cgroup_procs: descriptors of `cgroup.procs`, open for writing, of the cgroups that it joins.
        user: its user id, group id and only group; None keeps those of this process.
    
    Raises:
        OSError: a step failed. The message names the step, and there is no child.
    """
def tile_gradient(logits: numpy.typing.NDArray[numpy.float32], targets: numpy.typing.NDArray[numpy.int64], top: numpy.typing.NDArray[numpy.float32], total: numpy.typing.NDArray[numpy.float64], outer: numpy.typing.NDArray[numpy.float32], bias: numpy.typing.NDArray[numpy.float32] | None = None, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, temperature: typing.SupportsFloat | typing.SupportsIndex = 1.0, threads: typing.SupportsInt | typing.SupportsIndex = 1, instruction_set: str | None = None) -> None:
    """
    Overwrite logits with the gradient of sum(outer * logprob(targets)) with respect to them.
    
    Args:
        logits, targets, bias, softcap, temperature, threads, instruction_set: as in `tile_statistics`.
        top, total: results of `tile_statistics`, for the whole vocabulary if the tile is a part of it.
        outer: float32 `[rows]`, the factor of each row's log-prob.
    
    Raises:
        TypeError, ValueError: as `tile_statistics`, and ValueError if `logits` is read-only.
    """
def tile_statistics(logits: numpy.typing.NDArray[numpy.float32], targets: numpy.typing.NDArray[numpy.int64], bias: numpy.typing.NDArray[numpy.float32] | None = None, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0, temperature: typing.SupportsFloat | typing.SupportsIndex = 1.0, threads: typing.SupportsInt | typing.SupportsIndex = 1, instruction_set: str | None = None) -> tuple:
    """
    Compute softmax statistics of each row of a tile of logits.
    
    Scores are logits + bias, capped to softcap * tanh(scores / softcap) unless softcap is 0. Below, x is
    (score - top) / temperature.
    
    Args:
        logits: float32 `[rows, vocab]`, C-contiguous.
        targets: int64 `[rows]` in [0, vocab), or -1 if the target is in another part of the vocabulary.
        bias: float32 `[vocab]`; None adds nothing.
        softcap: the cap of the scores; 0 is no cap.
        temperature: divides the scores, above 0.
        threads: number of threads that share the rows.
        instruction_set: one of `instruction_sets()`; None takes the fastest.
    
    Returns:
        top float32, the largest score; total float64, the sum of exp(x); picked float32, the target's x,
        or 0 without a target; weighted float64, the sum of exp(x) * x. Each `[rows]`.
    
    Raises:
        TypeError: an array has another dtype or layout.
        ValueError: a shape does not fit, a target is out of range, or a number is not positive.
    """
