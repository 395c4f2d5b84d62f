# loramux on an NVIDIA GPU (it also runs, slowly, without one).
#   docker build -t loramux .
#   docker run --gpus all -p 8000:8000 -v "$PWD/models:/models:ro" loramux /models/my-model --enable-lora
ARG BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# The virtual environment is built here, so that pip's leftovers stay out of the image that runs.
FROM ${BASE} AS build
# The base tag is pinned; Ubuntu's archive keeps no old versions that could be.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/loramux
WORKDIR /src
COPY . .
RUN /opt/loramux/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
LABEL org.opencontainers.image.title="loramux" \
      org.opencontainers.image.description="One base model, thousands of LoRA adapters, one OpenAI-compatible server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/loramux/loramux"
# Triton compiles its kernels at the first start with a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --create-home --shell /usr/sbin/nologin loramux \
    && mkdir -p /home/loramux/.cache \
    && chmod -R g=u /home/loramux
COPY --from=build /opt/loramux /opt/loramux

# Platforms may run the image under any user id: its group is then 0, which owns the home folder.
# They also start it without --host, hence LORAMUX_HOST. LORAMUX_PORT is what the health check asks.
ENV PATH=/opt/loramux/bin:$PATH \
    HOME=/home/loramux \
    XDG_CACHE_HOME=/home/loramux/.cache \
    PYTHONUNBUFFERED=1 \
    LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000
WORKDIR /home/loramux
USER 10001:0
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['LORAMUX_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["loramux", "serve"]
