# A pod in a container: Toque and one app. BASE is any image with Python ≥ 3.11 and pip on glibc.
ARG BASE=python:3.12-slim
FROM ${BASE}

# Toque is built from this checkout; it runs without its extras, since `toque worker` needs none.
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
COPY workers /src/workers
COPY storage /src/storage
COPY chaos /src/chaos
# Debian's own Python asks for the variable; in a container there is nothing else to break.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir /src && rm -rf /src

# Every pod writes into /data only: its LMDB cache of the journal. A volume keeps it over restarts; losing it loses
# nothing, the next start reads the journal.
RUN useradd --system --uid 10001 toque && install -d -o toque /data /app
VOLUME /data
USER toque
WORKDIR /app
COPY examples /app

# exec form: SIGTERM has to reach Python itself, which then hands its stations over.
ENTRYPOINT ["python3", "-m", "toque", "worker"]
