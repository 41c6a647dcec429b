"""The store of the ranks."""

from pathlib import Path

import torch.distributed as dist

from kimi_core.run.launch import HOST, local_store


def test_only_this_host_reaches_the_store():
    store = local_store(5)
    listening = [
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    assert [one for one in listening if one.endswith(f":{store.port:04X}")] == [
        f"0100007F:{store.port:04X}"
    ]
    other = dist.TCPStore(HOST, store.port)
    other.set("key", "value")
    assert store.get("key") == b"value"
