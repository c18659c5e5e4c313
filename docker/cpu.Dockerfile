# A Ray node without a GPU: head, Data workers, the critic, and tiny policies.
# Build from the repository's root: docker build -f docker/cpu.Dockerfile -t sima-ray:cpu .
FROM python:3.11-slim-bookworm

# g++ and ninja build DeepSpeed's shared-memory collectives at first use, with two or more CPU workers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 sima

WORKDIR /opt/sima-ray
COPY requirements/cpu.txt requirements/fix_torchvision.py requirements/
# Set to PyTorch's CPU wheel index: pip's default index has the CUDA build only.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --no-deps --requirement requirements/cpu.txt \
    && python requirements/fix_torchvision.py

COPY pyproject.toml README.md ./
COPY sima_ray sima_ray
COPY serve_apps serve_apps
COPY jobs jobs
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

USER 10001
WORKDIR /home/sima
# Serve's as `sima up` sets them: sima_ray/runtime/cluster.py says why.
ENV HF_HUB_OFFLINE=1 RAY_AUTH_MODE=token
ENV RAY_SERVE_PROXY_USE_GRPC=1 RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=268435456
ENV RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60
ENV RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.5
# The token must be mounted or set (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH): without one Ray does not start.
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
