"""Settings of a run on several hosts."""

from pydantic import Field, model_validator

from kimi_core.config.section import Section


class ClusterConfig(Section):
    listen: str = ""
    """Address of this host at which rollout workers of other hosts join (`kimi worker --connect`),
    such as `10.0.0.1:29500`. They come and go while the run goes on. Empty: none."""
    token_file: str = ""
    """File with the token that the workers have to know, at least 16 characters."""
    silent_s: float = Field(10.0, ge=1)
    """Seconds after which a worker of another host counts as lost that says nothing. A shorter cut
    of the network is harmless."""
    transfer_s: float = Field(120.0, gt=0)
    """Longest time for sending one version of the weights to all other hosts, in seconds."""

    address: str = ""
    """Address of a Ray cluster; `auto`: the one that this host belongs to. Ray starts all of
    `rollout.workers` on its hosts, and starts them again when they end; and it starts the ranks of
    the trainer above 0. Empty: no Ray."""
    worker_cpus: int = Field(1, ge=1)
    """CPUs that Ray keeps free for each rollout worker and each rank that it starts, which uses as
    many threads."""

    hybrid: bool = False
    """Trainer and engine share the devices of this host and take turns: the processes of rollout
    workers or of vLLM end after each rollout, and start again before the next."""

    @property
    def is_open(self) -> bool:
        """Whether rollout workers come over the network."""
        return bool(self.listen or self.address)

    @model_validator(mode="after")
    def _has_a_token(self) -> "ClusterConfig":
        if self.listen and not self.token_file:
            raise ValueError(
                f"cluster.listen = {self.listen!r} without cluster.token_file: anybody could join; "
                "make a token with `openssl rand -hex 32`, and name its file"
            )
        if self.address and self.hybrid:
            raise ValueError(
                f"cluster.hybrid = true with cluster.address = {self.address!r}: workers that Ray "
                "places do not take turns with the trainer; leave one of them out"
            )
        return self
