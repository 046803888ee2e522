# mlx-server on Linux: `docker build -t mlx-server .`, or with `--build-arg EXTRA=cuda12` (or cuda13)
# for an NVIDIA GPU, which `docker run --gpus all` lends. Models and settings are kept in /data.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG EXTRA=cpu
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mlx_server ./mlx_server
RUN python -m venv /opt/mlx-server && \
    /opt/mlx-server/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRA}]"

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 1000 mlx && install --directory --owner mlx /data
COPY --from=build /opt/mlx-server /opt/mlx-server
# Beyond loopback it asks for a key: MLX_SERVER_API_KEYS='["KEY"]', or a keys_file.
ENV PATH=/opt/mlx-server/bin:$PATH \
    MLX_SERVER_HOME=/data \
    MLX_SERVER_HOST=0.0.0.0 \
    HF_HOME=/data/hub \
    XDG_CACHE_HOME=/data/cache-of-libraries \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER mlx
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "import urllib.request as request; request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["mlx-server"]
CMD ["serve"]
