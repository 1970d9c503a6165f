# docker build -t teckochecker .
# docker run --rm -e ADMIN_TOKEN -v teckochecker:/data teckochecker init
# docker run -d -e ADMIN_TOKEN -p 127.0.0.1:8000:8000 -v teckochecker:/data \
#     --read-only --tmpfs /tmp teckochecker
#
# /data is all that is kept: jobs.yaml, a .env, the database and its key. ADMIN_TOKEN is needed,
# since a container has to listen on all of its addresses to be reached.

FROM python:3.13-slim AS build
COPY requirements.txt /app/
# What is optional is there, too: psycopg for PostgreSQL, obstore for s3:// paths.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --requirement /app/requirements.txt \
        "psycopg[binary]>=3.2" "obstore>=0.12"

FROM python:3.13-slim
COPY --from=build /venv /venv
COPY teckochecker.py jobs.yaml.example /app/
# A new volume takes this owner over; a folder of the host needs chown 10001.
RUN install --directory --owner=10001 --group=10001 --mode=0700 /data
USER 10001:10001
WORKDIR /data
VOLUME /data
ENV API_HOST=0.0.0.0 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
# In reserve behind another node it is not ready, and so shown as unhealthy until it takes over.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["/venv/bin/python", "-c", \
    "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('API_PORT', 8000)}/readyz\", timeout=4)"]
# The exec form: the program itself gets SIGTERM, and ends within 10 s.
ENTRYPOINT ["/venv/bin/python", "/app/teckochecker.py"]
CMD ["start"]
