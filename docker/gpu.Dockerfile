# A Ray node with NVIDIA GPUs: policy replicas and training workers.
# Build from the repository's root: docker build -f docker/gpu.Dockerfile -t sima-ray:gpu .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-dev python3.12-venv g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home sima \
    && python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/sima-ray
COPY requirements/gpu.txt requirements/
RUN pip install --no-cache-dir --requirement requirements/gpu.txt

COPY pyproject.toml README.md ./
COPY sima_ray sima_ray
COPY serve_apps serve_apps
COPY jobs jobs
COPY configs configs
RUN pip install --no-cache-dir --no-deps .

USER sima
WORKDIR /home/sima
ENV HF_HUB_OFFLINE=1 RAY_AUTH_MODE=token
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
