# An image in which runs with `rollout.engine = "vllm"` work on a CPU:
#
#   docker build -f python/vllm.Dockerfile -t kimi-vllm .
#   docker run --rm --shm-size 4g -v "$PWD/runs:/kimi/runs" kimi-vllm
#
# The sandbox needs user namespaces: add `--security-opt seccomp=unconfined` for rewards of programs.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git bubblewrap libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /kimi
COPY . .
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python/install_vllm.sh /opt/vllm

ENV PATH=/opt/vllm/bin:$PATH
ENTRYPOINT ["kimi"]
CMD ["train", "smollm2-vllm"]
