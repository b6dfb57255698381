# docker build -t vmod .                              for NVIDIA GPUs (needs the driver and NVIDIA's container toolkit)
# docker build -t vmod --build-arg DEVICE=cpu .       without
#
# docker run --gpus all --stop-timeout 120 -v "$PWD/runs:/vmod/runs" vmod train --config configs/tiny.py --workdir runs/x
#
# `docker stop` sends SIGTERM: the run saves and ends with 75; the same command goes on.
FROM python:3.12-slim

ARG DEVICE=cuda
WORKDIR /vmod
COPY . .
RUN if [ "$DEVICE" = cpu ]; then extra=serve; else extra="serve,$DEVICE"; fi \
  && pip install --no-cache-dir -c requirements/py312.txt -e ".[$extra]"

ENTRYPOINT ["vmod"]
CMD ["--help"]
