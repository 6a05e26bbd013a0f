# Image of a server for an exported model; docs/serving.md explains it.
#
#   docker build --target cpu --tag advmoe-serve .
#   docker build --target gpu --tag advmoe-serve:gpu .
#   docker run --publish 8000:8000 --volume "$PWD/models:/models:ro" advmoe-serve /models/model.onnx
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --system serve
COPY export /src/export
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, unlike urllib, asks no proxy that the environment names
HEALTHCHECK --start-period=30s --interval=10s CMD ["python", "-c", "from http.client import HTTPConnection; c = HTTPConnection('127.0.0.1', 8000, timeout=3); c.request('GET', '/v2/health/ready'); exit(c.getresponse().status != 200)"]

# onnxruntime-gpu uses CUDA and cuDNN from these packages, so the base image does not need CUDA.
FROM base AS gpu
RUN python -m pip install '/src/export[gpu,serve]' 'onnxruntime-gpu[cuda,cudnn]'
USER serve
ENTRYPOINT ["advmoe-serve", "--host", "0.0.0.0", "--provider", "cuda", "--provider", "cpu"]

FROM base AS cpu
RUN python -m pip install '/src/export[cpu,serve]'
USER serve
ENTRYPOINT ["advmoe-serve", "--host", "0.0.0.0"]
