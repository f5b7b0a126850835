# flexgen-helm in a container, on GPUs or the CPU: docs/installing.md. What it fetches and keeps lies in /data.
FROM python:3.11-slim-bookworm

# A C compiler, for zstandard 0.18, which HELM asks for and which has no wheel for this Python, and for the engine, which
# compiles its functions for the processor (and Triton's for the GPU) where it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir --mode=1777 /data /work

WORKDIR /usr/src/flexgen-helm
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY engine ./engine
COPY flexgen_helm ./flexgen_helm
COPY configs ./configs
COPY run_specs ./run_specs
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir '.[gguf,lm-eval,peft,sentencepiece,serve,tiktoken]'

# Anybody may write to both: results belong to the user whom `docker run --user` names.
ENV HOME=/data HF_HOME=/data/huggingface XDG_CACHE_HOME=/data/cache NLTK_DATA=/data/nltk
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["flexgen-helm"]
CMD ["doctor"]
