# A Ray node with NVIDIA GPUs: policy replicas and training workers.
# Build from the repository's root: docker build -f docker/gpu.Dockerfile -t sima-ray:gpu .
FROM python:3.11-slim-bookworm

# The wheels bring CUDA's libraries; g++ is for what Triton and DeepSpeed compile at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 sima

WORKDIR /opt/sima-ray
COPY requirements/gpu.txt requirements/
RUN pip install --no-cache-dir --requirement requirements/gpu.txt

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
# A worker of a cluster; KubeRay gives its own command.
ENTRYPOINT ["ray", "start", "--block", "--disable-usage-stats"]
CMD ["--head", "--dashboard-host=127.0.0.1"]
